"""Which modules of a model PEFT would put an adapter on, by the fields of its configuration (PEFT, `tuners/tuners_utils.py`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .names import is_or_ends, unwrapped
from .patterns import matches


def targets_of_config(config: Mapping[str, Any]) -> tuple[str, ...] | str:
    """`target_modules`: one pattern, or names without what wraps modules."""
    listed = config.get("target_modules") or ()
    return listed if isinstance(listed, str) else tuple(unwrapped(entry) for entry in listed)


def is_selected(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `config` puts an adapter on the module of that name, where the model has it.

    Raises `PatternError` for a pattern that cannot be matched in bounded time.

    >>> is_selected("layers.0.v_proj", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*v_proj"})
    False
    >>> is_selected("layers.3.v_proj", {"target_modules": ["v_proj"], "layers_to_transform": [0, 3]})
    False
    >>> is_selected("model.layers.3.v_proj", {"target_modules": ["v_proj"], "layers_to_transform": [0, 3]})
    True
    """
    excluded = config.get("exclude_modules")
    if excluded and (matches(excluded, module) if isinstance(excluded, str) else any(is_or_ends(module, e) for e in excluded)):
        return False
    if any(f".{entry}." in f".{module}." for entry in _names(config.get("modules_to_save"))):
        return False  # saved whole: PEFT puts no adapter on those
    listed = targets_of_config(config)
    if isinstance(listed, str):
        return matches(listed, module)
    return any(is_or_ends(module, entry) for entry in listed) and (module in listed or _in_layers(module, config))


def _in_layers(module: str, config: Mapping[str, Any]) -> bool:
    layers = config.get("layers_to_transform")
    wanted = [layers] if isinstance(layers, int) else layers
    if not wanted:
        return True
    number = _layer(module, _names(config.get("layers_pattern")))
    return number is not None and number in wanted


def _layer(module: str, stacks: Sequence[str]) -> int | None:
    """The first number in the name, or the first after one of `stacks`."""
    parts = module.split(".")
    for i, part in enumerate(parts[:-1]):
        if re.fullmatch(r"\d+", part) and (parts[i - 1] in stacks if stacks else i > 1):
            return int(part)
    return None


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())

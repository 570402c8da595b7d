"""Which modules of a model PEFT would put an adapter on, by the fields of its configuration (PEFT, `tuners/tuners_utils.py`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .names import Endings, ends_of, unwrapped
from .patterns import matches


def targets_of_config(config: Mapping[str, Any]) -> tuple[str, ...] | str:
    """`target_modules`: one pattern, or names without what wraps modules."""
    listed = config.get("target_modules") or ()
    return listed if isinstance(listed, str) else tuple(unwrapped(entry) for entry in listed)


class Selection:
    """What a configuration puts an adapter on, to be asked for many modules.

    >>> Selection({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*v_proj"}).selects("layers.0.v_proj")
    False
    >>> Selection({"target_modules": ["v_proj"], "layers_to_transform": [0, 3]}).selects("layers.3.v_proj")
    False
    >>> Selection({"target_modules": ["v_proj"], "layers_to_transform": [0, 3]}).selects("model.layers.3.v_proj")
    True
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._listed = targets_of_config(config)
        self._targets = Endings(() if isinstance(self._listed, str) else self._listed)
        self._whole = frozenset(() if isinstance(self._listed, str) else self._listed)
        self._excluded = config.get("exclude_modules")
        self._out = Endings(() if isinstance(self._excluded, str) else self._excluded or ())
        self._saved = frozenset(_names(config.get("modules_to_save")))

    def selects(self, module: str) -> bool:
        """Whether there is an adapter on the module of that name, where the model has it.

        Raises `PatternError` for a pattern that cannot be matched in bounded time.
        """
        excluded = self._excluded
        if excluded and (matches(excluded, module) if isinstance(excluded, str) else self._out.any_is_end_of(module)):
            return False
        if any(path in self._saved for end in ends_of(module) for path in _beginnings(end)):
            return False  # saved whole: PEFT puts no adapter on those
        if isinstance(self._listed, str):
            return matches(self._listed, module)
        return self._targets.any_is_end_of(module) and (module in self._whole or _in_layers(module, self._config))


def _beginnings(name: str) -> Iterator[str]:
    """`name`, and what of it comes before each of its dots."""
    while name:
        yield name
        name = name.rpartition(".")[0]


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

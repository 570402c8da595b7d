"""Which way round a weight is stored: (out_features, in_features), or the other way.

Shapes tell where they differ. Where a weight is square it is the model's family, for a stack of experts also the version of PEFT
that trained the adapter, and nothing is guessed where these are not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import AmbiguousNameError, ShapeMismatchError, printable
from .families import families_of, stored_transposed


def matrix_orientation(
    tensor: str, straight: bool, turned: bool, expected: str, adapter: Adapter, config: Mapping[str, Any] | None, where: str
) -> tuple[bool, str]:
    """Whether the matrix `tensor` is stored (in, out), and why where that had to be decided: by the model's family first, by its
    shape, by the adapter's word last.

    - `straight`, `turned`: whether ΔW fits as it is, and turned round; at least one of them
    - `expected`: the shape of (in, out), for an error

    Raises `ShapeMismatchError` where it fits only the other way.
    """
    if (family := stored_transposed(tensor, config)) is not None:
        if not turned:
            raise ShapeMismatchError(f"{where}: {family} stores {printable(tensor)} as (in, out), expected {expected}")
        return True, ""
    model = (config or {}).get("model_type", (config or {}).get("_class_name"))
    if straight and turned and not isinstance(model, str):
        word = "(in, out)" if adapter.fan_in_fan_out else "(out, in)"
        why = f"a square weight of an unknown model is taken to be stored {word}, as fan_in_fan_out says"
        return adapter.fan_in_fan_out, why
    if straight:
        return False, ""
    if adapter.fan_in_fan_out:
        return True, "stored (in, out), by its shape and the adapter's fan_in_fan_out"
    raise ShapeMismatchError(
        f"{where}: ΔW fits {printable(tensor)} only turned round: only the transpose would fit",
        hint="if the model stores this weight as (in, out), set fan_in_fan_out to true in the adapter's configuration",
    )


def turned_modules(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Whether PEFT saw the stacks of a module of experts turned round, by that module's name, where one that is not square tells.

    - `shapes`: of what is stored for the modules of `adapter`, by their names

    All stacks of a module are seen the same way round (PEFT, `tuners/lora/layer.py: ParamWrapper`).
    """
    seen: dict[str, set[bool]] = {}
    for name, module in adapter.modules.items():
        if module.index is not None and shapes[name] in (module.shape, module.shape[::-1]) and len(set(module.shape)) == 2:
            seen.setdefault(module.tensor.rpartition(".")[0], set()).add(shapes[name] != module.shape)
    return {around: ways.pop() for around, ways in seen.items() if len(ways) == 1}


def expert_orientation(
    tensor: str,
    straight: bool,
    turned: bool,
    adapter: Adapter,
    config: Mapping[str, Any] | None,
    where: str,
    *,
    parameter: bool,
    others: bool | None,
) -> tuple[bool, str]:
    """Whether the matrices of the stack `tensor` are stored (in, out) as ΔW sees it, and why.

    - `straight`, `turned`: whether ΔW fits as it is, and turned round; at least one of them
    - `parameter`: whether ΔW was trained on the stack itself (PEFT's target_parameters), not on the layer of one expert
    - `others`: which way the other stacks of the same module are seen, where that is known

    Raises `AmbiguousNameError` where both fit and nothing tells.
    """
    if straight != turned:
        return turned, "an expert of a stack" + (", stored (in, out) by its shape" if turned else "")
    if others is not None:
        return others, "an expert of a stack of square weights, seen as the other stacks of the same experts"
    families = [family for family in families_of(config) if family.experts != "out-in"] or families_of(config)[:1]
    if len(families) == 1 and families[0].experts is not None:
        if not (parameter and adapter.format == "peft"):
            return families[0].experts == "in-out", "an expert of a stack, stored as its family does"
        version = _version(adapter.config.get("peft_version"))
        if version is not None:
            # PEFT up to 0.18 saw any stack as (experts, in, out), 0.19.0 all but those marked is_transposed, later ones these
            marked = families[0].is_transposed
            turned = True if version < (0, 19) else not marked if version < (0, 19, 1) else marked
            return (
                turned,
                f"an expert of a stack of square weights, as PEFT {adapter.config['peft_version']} with transformers 5 sees it",
            )
    raise AmbiguousNameError(
        f"{where}: the experts of {printable(tensor)} are square, and whether they are stored (out, in) or (in, out) is not known"
        " for this model and this adapter",
        hint="nothing was written; config.json needs the model_type, adapter_config.json the peft_version that trained it",
    )


def _version(text: Any) -> tuple[int, ...] | None:
    """The numbers that a version begins with.

    >>> _version("0.19.1.dev0"), _version(None)
    ((0, 19, 1), None)
    """
    found = re.match(r"\d+(?:\.\d+)*", text) if isinstance(text, str) else None
    return tuple(int(part) for part in found[0].split(".")) if found else None

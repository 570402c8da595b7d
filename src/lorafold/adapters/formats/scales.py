"""The factor alpha / dim of formats that store a number alpha beside each module, and what it is where they do not.

A file in which some modules have an alpha and others have none has lost some, or was put together from two: which strength the
others were trained with cannot be told, so it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TypeAlias

from ...errors import AdapterError, printable
from ..adapter import Scaling
from .single_file import some

Alphas: TypeAlias = Mapping[str, tuple[float | None, str]]
"""By module, its alpha, None where it has none, and where it comes from."""


def scaling_of(dim: int, alpha: float | None, source: str = "its own") -> Scaling:
    """alpha / dim; where alpha is 0 or missing it is dim, so that the factor is 1 (kohya-ss/sd-scripts, `networks/lora.py`).

    >>> scaling_of(8, 4.0).why, scaling_of(8, None).value
    ('alpha 4 (its own) / dim 8', 1.0)
    """
    if alpha is None or alpha == 0:
        return Scaling(1.0, dim, float(dim), f"alpha {'missing' if alpha is None else '0'}, so it is dim {dim}: 1")
    return Scaling(alpha / dim, dim, float(alpha), f"alpha {alpha:g} ({source}) / dim {dim}")


def settle_alphas(
    stored: Mapping[str, float], needing: Collection[str], given: float | None, shown: str
) -> tuple[Alphas, tuple[str, ...]]:
    """The alpha of each module of `needing` with where it comes from, and notes.

    - `given`: by the user, for modules that have none

    Raises `AdapterError` where some have one, others not, and none is given; or one is no finite number.
    """
    for name in needing:
        if not math.isfinite(stored.get(name, 0.0)):
            raise AdapterError(f"{shown}: the alpha of {printable(name)} is {stored[name]}, expected a finite number")
    lack = [name for name in needing if name not in stored]
    alphas = {name: (stored[name], "its own") if name in stored else (given, "as given") for name in needing}
    if not lack:
        return alphas, ()
    if given is not None:
        return alphas, (f"{len(lack)} modules have no alpha: {given:g} was given",)
    if len(lack) < len(needing):
        raise AdapterError(
            f"{shown}: {len(lack)} of {len(needing)} modules have no alpha: {some(lack)}",
            hint="tensors were lost, or the file was put together from two; `ReadOptions(lora_alpha=…)` says what it is for these",
        )
    return alphas, ("the file has no alpha: each module's is taken to be its dim, so that the factor is 1",)

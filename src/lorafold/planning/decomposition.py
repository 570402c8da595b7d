"""How long it takes to compute anew what adapters took out of the base before they were trained, said before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .plan import Step

_PER_SECOND = 25e9
"""Operations in a second of one thread, as they were measured on a Xeon of 2.8 GHz for weights of 576² to 2048²."""

_SHORT = 10.0
"""Seconds that need no word."""


def decomposition_notes(steps: Iterable[Step]) -> list[str]:
    """A note where the weights that `steps` decompose take longer than some seconds; none otherwise."""
    kinds: list[str] = []
    operations = 0.0
    for step in steps:
        if step.replacement is not None:  # PEFT saved what was left
            continue
        for addend in step.addends:
            if addend.residual not in (None, "given"):
                kinds.append(str(addend.residual))
                operations += _operations(step.shape, str(addend.residual))
    seconds = operations / _PER_SECOND
    if seconds <= _SHORT:
        return []
    quick = "; `ReadOptions(initial_adapter=…)`, the adapter as it was before training, takes no longer than any other"
    return [
        f"what {', '.join(sorted({*kinds}))} took out of {len(kinds)} weights is computed anew, which takes some {_time(seconds)}"
        f" of one processor, and as long again to be proven{quick if 'kasa' not in kinds else ''}"
    ]


def _operations(shape: tuple[int, ...], kind: str) -> float:
    """Those of W Wᵀ and its eigenvectors; a projection alone takes a fraction, which is not counted."""
    rows, columns = shape[0], math.prod(shape[1:])
    smaller, larger = min(rows, columns), max(rows, columns)
    return 0.0 if kind == "olora" else smaller * smaller * (2.0 * larger + 9.0 * smaller)


def _time(seconds: float) -> str:
    """
    >>> _time(42.0), _time(400.0), _time(20000.0)
    ('42 s', '7 min', '5.6 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

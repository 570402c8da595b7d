"""A whole weight rotated and rounded once, where its rows depend on so many others that no block of them can be done by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .cpu.turning import rotate_native
from .rotations import RowRotation
from .rounding import Stochastic, to_nearest, to_stochastic
from .stats import Kept


@dataclass(frozen=True, eq=False)
class RotatedWeight:
    """A weight that is rotated and rounded.

    - `rows`: (rows, columns); `dots`, `squares`: (rows,) float64, the inner products of kept, row by row
    """

    rows: Tensor
    dots: Tensor
    squares: Tensor

    def kept(self, start: int, stop: int) -> Kept:
        """How much of what changes they kept, of rows `start` to `stop`."""
        return Kept(float(self.dots[start:stop].sum()), float(self.squares[start:stop].sum()))


def rotate_weight(weight: Tensor, rotation: RowRotation, dtype: torch.dtype, noise: Stochastic | None = None) -> RotatedWeight:
    """All of `weight`, (rows, columns) of any floating dtype, rotated and rounded once to `dtype`, a zero as +0.

    - `noise`: what decides how numbers are rounded, as `noise_of` gives it; None, and they are rounded to nearest
    """
    rows = weight.shape[0]
    found = RotatedWeight(
        torch.empty(weight.shape, dtype=dtype, device="cpu"),
        torch.zeros(rows, dtype=torch.float64, device="cpu"),
        torch.zeros(rows, dtype=torch.float64, device="cpu"),
    )
    if rotate_native(weight, found.rows, rotation, noise, found.dots, found.squares):
        return found
    each = max(rotation.group, _TILE // max(1, weight.shape[1]) // rotation.group * rotation.group)
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for start in range(0, rows, each):
            here = slice(start, min(start + each, rows))
            base = weight[here].double()
            value = rotation.of_rows(base, start) + 0.0
            if noise is None:
                found.rows[here] = to_nearest(value, dtype)
            else:
                part = replace(noise, start=noise.start + start * weight.shape[1])
                found.rows[here] = to_stochastic(value.float(), dtype, part)
            found.rows[here].masked_fill_(value.isnan(), float("nan"))
            moved = value - base
            found.dots[here] = ((found.rows[here].double() - base) * moved).sum(1)
            found.squares[here] = (moved * moved).sum(1)
    return found


_TILE = 1 << 18
"""Elements that torch does at once, or a group of rows."""

"""Rotations in compiled code, in memory and from file to file: how they are handed to it.

Wherever it does not apply, these functions say so, and rotate.py does the same with torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..rotations import RowRotation
from ..rounding import Stochastic
from ..stats import Kept
from .loader import Build, Rotation, build
from .pointers import address
from .rowwise import Manner, Within, addressable, in_memory, streams, through
from .stream import FileRows


def _packed(rotation: RowRotation, used: Build) -> Tensor:
    """The matrices as `struct rotation` has them."""
    stages, blocks, size, _ = rotation.matrices.shape
    height = used.number("rows")
    rows = pad(rotation.matrices, (0, 0, 0, -size % height))  # (stages, blocks, size up to whole tiles, size)
    return rows.view(stages, blocks, -1, height, size).transpose(-1, -2).contiguous()


class _Turn:
    """A job, and what must stay in memory while it is done."""

    def __init__(self, used: Build, rotation: RowRotation, source: torch.dtype, columns: int, manner: Manner) -> None:
        self.job, self._packed = Rotation(), rotation.once(used.name, lambda: _packed(rotation, used))
        manner.into(self.job.all, source, columns)
        self._room = torch.zeros(used.rotation_room(rotation.group, columns), dtype=torch.float64, device="cpu")
        self.job.packed, self.job.room = address(self._packed, torch.float64), address(self._room, torch.float64)
        if rotation.rescale is not None:
            self.job.rescale = address(rotation.rescale, torch.float64)
        self.job.stages, self.job.blocks, self.job.size, _ = rotation.matrices.shape
        self.job.butterfly, self.job.group = rotation.butterfly, rotation.group
        self.job.high = rotation.rows


def rotate_native(
    weight: Tensor, out: Tensor, rotation: RowRotation, noise: Stochastic | None, dots: Tensor, squares: Tensor
) -> bool:
    """Fill `out` with what `rotation` makes of all of `weight`, rounded; `dots` and `squares`, which are zero, with what was kept.

    Whether that was done; where not, there is nothing in them, and it takes torch.
    """
    used = build()
    if used is None or not weight.numel() or not addressable(weight) or not addressable(out):
        return False
    turn = _Turn(used, rotation, weight.dtype, weight.shape[1], Manner(0, out.dtype, noise))
    in_memory(turn.job.all, weight, out, 0, weight.shape[0])
    turn.job.dots, turn.job.squares = address(dots, torch.float64), address(squares, torch.float64)
    used.rotate(ctypes.byref(turn.job))
    if math.isfinite(turn.job.all.dot + turn.job.all.square):
        return True
    dots.zero_()
    squares.zero_()
    return False  # what NaN is written as is torch's affair


def rotate_between(
    source: FileRows, rows: int, target: FileRows, rotation: RowRotation, first: int, noise: Stochastic | None
) -> tuple[int, Kept]:
    """Read rows of W from `source`, and write what `rotation` makes of them to `target`, with the bits of `rotate_weight`.

    - `source`: of `rows` rows, the first of which is number `first`; those that they depend on lie before and behind them

    How many rows went through, from the first on, and what was kept in them; as `merge_between` has it.
    """
    used, group = build(), rotation.group
    low = first // group * group
    high = -(-(first + rows) // group) * group
    source = replace(source, start=source.start - (first - low) * source.row_bytes)
    if used is None or not streams(used, source, rows, target) or not source.columns:
        return 0, Kept()
    start = None if noise is None else replace(noise, start=noise.start - (first - low) * source.columns)
    turn = _Turn(used, rotation, source.dtype, source.columns, Manner(low, target.dtype, start))
    turn.job.low, turn.job.high = first, first + rows
    return through(used, used.rotate, turn.job, source, high - low, target, Within(first - low, first - low + rows, group))

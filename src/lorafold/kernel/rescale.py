"""DoRA and its like: updates of which some bring what there is to a trained length, and the result rounded once.

What `exact` means for such a weight: `wide` defines the sums and lengths, and `Rescale` the factors, each operation of which is
rounded to float64. From W_0 = W, each stage in turn makes

    W_n = fl(fl(keep · W_{n−1}) + fl(factor · fl(W_{n−1} + ΔW_n)))

without the first product where `keep` is zero, and fl(W_{n−1} + ΔW_n) where it only adds. The last of them, a zero as +0, is
rounded once to the output's dtype, by the rounding that was asked for. The length is that of W + ΔW_n, whatever came before, as
in PEFT's layers from 0.21.2 on (huggingface/peft#3608).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu.rescaling import add_squares_native, rescale_native
from .merge import merge_weight
from .numerics import one_thread, subnormal_numbers
from .rounding import Rounding, to_nearest
from .stages import Stage
from .stats import Kept
from .update import LowRankUpdate
from .wide import add_squares, row_lengths, wide_delta

_TILE = 1 << 16
"""Elements that torch does at once."""


def rescale_rows(matrix: Tensor, stages: Sequence[Stage], first: int, *, out: Tensor, rounding: Rounding = "nearest") -> Kept:
    """Fill `out` with what `stages` make of W, see above; how much of the change that kept.

    - `matrix`: (rows, columns), the rows from `first` on of what the stages are of, of any floating dtype
    - `out`: of its shape, elsewhere
    """
    if rounding == "nearest":
        kept = rescale_native(matrix, out, stages, first)
        if kept is not None:
            return kept
    kept = Kept()
    step = max(1, _TILE // max(1, matrix.shape[1]))
    with torch.no_grad(), subnormal_numbers(), one_thread():
        if rounding != "nearest":
            step = max(1, matrix.shape[0])  # whose noise is that of its place
        for start in range(0, matrix.shape[0], step):
            rows = slice(start, start + step)
            kept += _rescaled(matrix[rows].double(), stages, first + start, out[rows], rounding)
    return kept


def _rescaled(base: Tensor, stages: Sequence[Stage], first: int, out: Tensor, rounding: Rounding) -> Kept:
    value = base
    for stage in stages:
        delta = wide_delta(stage.update.narrow(0, first, base.shape[0]))
        total, rescale = value + delta, stage.rescale
        if rescale is None:
            value = total
            continue
        if rescale.of_columns is None:
            factors = rescale.factors(row_lengths(total if value is base else base + delta), first)[:, None]
        else:
            factors = rescale.of_columns
        total *= factors
        value = total if rescale.keep == 0 else (value * rescale.keep).add_(total)
    value = value + 0.0
    if rounding == "nearest":
        out.copy_(to_nearest(value, out.dtype))
        out.masked_fill_(value.isnan(), float("nan"))
    else:
        nothing = LowRankUpdate(base.new_zeros(1, base.shape[1]), base.new_zeros(base.shape[0], 1), 1.0)
        merge_weight(value, [nothing], out=out, rounding=rounding)
    moved = value - base
    return Kept(float(((out.double() - base) * moved).sum()), float((moved * moved).sum()))


def add_column_squares(squares: Tensor, matrix: Tensor, stage: Stage, first: int) -> None:
    """Add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    - `matrix`: W, the rows from `first` on of what the stage is of
    """
    if add_squares_native(squares, matrix, stage, first):
        return
    with torch.no_grad(), subnormal_numbers(), one_thread():
        add_squares(squares, matrix.double() + wide_delta(stage.update.narrow(0, first, matrix.shape[0])))

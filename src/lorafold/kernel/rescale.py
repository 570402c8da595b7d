"""DoRA and its like, IA³ and GLoRA: updates of which some rescale what there is, and the result rounded once.

What `exact` means for such a weight: `wide` defines the sums and lengths, and `Rescale` the factors, each operation of which is
rounded to float64. From W_0 = W, each stage in turn makes

    W_n = fl(fl(keep · W_{n−1}) + fl(factor · fl(W_{n−1} + ΔW_n)))

without the first product where `keep` is zero, and fl(W_{n−1} + ΔW_n) where it only adds. The last of them, a zero as +0, is
rounded once to the output's dtype; by way of float32 where that is done stochastically. The length is that of W + ΔW_n, whatever
came before, as in PEFT's layers from 0.21.2 on (huggingface/peft#3608). IA³'s factors are given; and of GLoRA B is the product of W
and what was trained, each number of which is added up as those of ΔW are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .cpu.rescaling import add_squares_native, rescale_native
from .rounding import Rounding, noise_of, to_nearest, to_stochastic
from .stages import Multiply, Stage
from .stats import Kept
from .update import LowRankUpdate
from .wide import add_squares, row_lengths, wide_delta

_TILE = 1 << 16
"""Elements that torch does at once."""

_TOGETHER = 8
"""Rows that compiled code does together, or a multiple of them."""


def rescale_rows(matrix: Tensor, stages: Sequence[Stage], first: int, *, out: Tensor, rounding: Rounding = "nearest") -> Kept:
    """Fill `out` with what `stages` make of W, see above; how much of the change that kept.

    - `matrix`: (rows, columns), the rows from `first` on of what the stages are of, of any floating dtype
    - `stages`: where there are none, W is rounded
    - `out`: of its shape, elsewhere
    - `rounding`: as `merge_weight` has it
    """
    noise = noise_of(rounding, out.dtype)
    by_native = rescale_native(matrix, out, stages, first, noise) if stages else None
    if by_native is not None:
        return by_native
    kept, columns = Kept(), matrix.shape[1]
    step = max(1, _TILE // max(1, columns) // _TOGETHER) * _TOGETHER
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for start in range(0, matrix.shape[0], step):
            rows = slice(start, start + step)
            base, result = matrix[rows].double(), out[rows]
            value = _value(base, stages, first + start)
            if noise is None:
                result.copy_(to_nearest(value, out.dtype))
            else:
                result.copy_(to_stochastic(value.float(), out.dtype, replace(noise, start=noise.start + start * columns)))
            result.masked_fill_(value.isnan(), float("nan"))
            moved = value - base
            kept += Kept(float(((result.double() - base) * moved).sum()), float((moved * moved).sum()))
    return kept


def _value(base: Tensor, stages: Sequence[Stage], first: int) -> Tensor:
    """What `stages` make of the rows `base`, (rows, columns) float64, before it is rounded to another dtype."""
    value = base
    for stage in stages:
        update = stage.update.narrow(0, first, base.shape[0])
        if stage.inner is not None:
            update = replace(update, lora_B=wide_delta(LowRankUpdate(stage.inner.double(), base, 1.0)))
        delta = wide_delta(update)
        total, rescale = value + delta, stage.rescale
        if rescale is None:
            value = total
            continue
        if rescale.of_columns is not None:
            factors = rescale.of_columns
        elif isinstance(rescale, Multiply):
            factors = rescale.by[first : first + base.shape[0], None]
        else:
            factors = rescale.factors(row_lengths(total if value is base else base + delta), first)[:, None]
        total *= factors
        value = total if rescale.keep == 0 else (value * rescale.keep).add_(total)
    return value + 0.0


def add_column_squares(squares: Tensor, matrix: Tensor, stage: Stage, first: int) -> None:
    """Add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    - `matrix`: W, the rows from `first` on of what the stage is of
    """
    if add_squares_native(squares, matrix, stage, first):
        return
    with torch.no_grad(), subnormal_numbers(), one_thread():
        add_squares(squares, matrix.double() + wide_delta(stage.update.narrow(0, first, matrix.shape[0])))

"""W + Σ scaling · P ∘ Q, summed in float64 and rounded once: elementwise.py says what that means, and why it is right."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .cpu.multiplying import multiply_native
from .elementwise import ElementwiseSum, Multiplicand
from .errorfree import two_product, two_sum
from .rounding import Stochastic, to_nearest, to_odd, to_stochastic
from .stats import Kept

_TILE = 1 << 16  # elements at once, whose intermediate numbers stay in the cache


def merge_elementwise(
    matrix: Tensor,
    total: ElementwiseSum,
    first: int,
    *,
    out: Tensor,
    precision: Literal["fast", "exact"],
    noise: Stochastic | None = None,
) -> Kept:
    """Fill `out` with round(W + ΔW), as `merge_rows` does for factors; how much of ΔW that kept.

    - `matrix`: (rows, columns), the rows from `first` on of what `total` is of, of any floating dtype
    - `out`: of its shape, elsewhere
    - `noise`: what decides how sums are rounded, as `noise_of` gives it; None, and they are rounded to nearest
    """
    by_native = multiply_native(matrix, out, total, first, precision, noise)
    if by_native is not None:
        return by_native
    kept, step = Kept(), max(1, _TILE // max(1, matrix.shape[1]))
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for start in range(0, matrix.shape[0], step):
            base = matrix[start : start + step].double()
            result, delta = _merged(base, total, first + start, out.dtype if noise is None else torch.float32, precision)
            if noise is not None:
                here = replace(noise, start=noise.start + start * matrix.shape[1])
                result = to_stochastic(result.contiguous(), out.dtype, here)
            out[start : start + step] = result
            kept += Kept(float(((result.double() - base) * delta).sum()), float((delta * delta).sum()))
    return kept


def _merged(
    base: Tensor, total: ElementwiseSum, first: int, target: torch.dtype, precision: Literal["fast", "exact"]
) -> tuple[Tensor, Tensor]:
    """round(W + ΔW) to `target` of the rows `base`, float64, from `first` on, and ΔW as it was computed."""
    which, bound = torch.arange(first, first + base.shape[0], device="cpu"), total.bound
    doubled = target == torch.float64 and precision == "exact"
    high, low = _delta(total, which, doubled=doubled)
    head, loss = two_sum(base, high)
    if precision == "fast":
        merged, least = to_nearest(head + 0.0, target), None
    else:
        error = torch.outer(bound.rows[which] * (bound.share if doubled else 1.0), bound.columns)
        if doubled:
            loss += low
            head, tail = two_sum(head, loss)
            error += (loss.abs() + 2 * tail.abs()) * 2.0**-52
            merged, least = head + (tail + error), head + (tail - error)
        else:
            error += head.abs() * 2.0**-51
            head += 0.0  # a sum of zero is +0
            merged, least = to_nearest(head + error, target), to_nearest(head - error, target)
    finite = base.isfinite() & high.isfinite()
    if least is not None:
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[merged.element_size()]
        undecided = (merged.view(integer) != least.view(integer)) | (not bound.safe)
        for i, j in (undecided & finite).nonzero().tolist():
            real = _real(total, first + i, j, float(base[i, j]))
            merged[i, j] = real[0] if target == torch.float64 else to_nearest(to_odd(*real), target)[0]
    merged = torch.where(finite, merged, (base + high).to(target))
    return merged.masked_fill_(merged.isnan(), torch.nan), high


def _delta(total: ElementwiseSum, which: Tensor, *, doubled: bool) -> tuple[Tensor, Tensor]:
    """(n, columns) float64: the rows `which` of ΔW, and where it is `doubled` what their roundings lost; else zeros."""
    high = low = torch.zeros(which.shape[0], total.shape[1], dtype=torch.float64, device="cpu")
    for update in total.updates:
        P, Q = (
            None if rows is None or columns is None else tuple(each[:, columns] for each in _numbers(side, rows, doubled=doubled))
            for side, rows, columns in zip(
                (update.one, update.other or update.one), update.rows(which), update.columns(), strict=True
            )
        )
        if P is None:
            continue
        if not doubled:
            product = P[0] * update.scaling
            high = high + (product if Q is None else product * Q[0])
            continue
        scaling = torch.full_like(P[0], update.scaling)
        product, error = two_product(P[0], scaling)
        error += P[1] * update.scaling
        if Q is not None:
            scaled, rest = product, error
            product, error = two_product(scaled, Q[0])
            error += scaled * Q[1] + rest * Q[0]
        high, loss = two_sum(high, product)
        low = low + (loss + error)
    return high, low


def _numbers(side: Multiplicand, rows: Tensor, *, doubled: bool) -> tuple[Tensor, Tensor]:
    """(n, columns) float64: the rows `rows` of P, and what their roundings lost where it is `doubled`; else zeros."""
    A = side.lora_A.double()
    if side.lora_B is None:
        return A[rows], torch.zeros_like(A[rows])
    B = side.lora_B[rows].double()
    if not doubled:
        high = B @ A
        return high, torch.zeros_like(high)
    high = low = B.new_zeros(B.shape[0], A.shape[1])
    for k in range(side.r):
        product, error = two_product(B[:, k, None].expand_as(high), A[k].expand_as(high))
        high, loss = two_sum(high, product)
        low = low + (loss + error)
    return high, low


def _real(total: ElementwiseSum, i: int, j: int, weight: float) -> tuple[Tensor, Tensor]:
    """W + ΔW at (i, j) in rational numbers: rounded to float64, and the sign of the rest; (1,) both."""
    real = Fraction(weight)
    for update in total.updates:
        product = Fraction(update.scaling)
        row, column = (torch.tensor([place], dtype=torch.int64, device="cpu") for place in (i, j))
        for side, here, there in zip(update.sides, update.rows(row), update.T.rows(column), strict=False):
            if here is not None and there is not None:
                product *= _real_number(side, int(here), int(there))
        real += product
    try:
        head = float(real)
        rest = real - Fraction(head)
    except OverflowError:
        head, rest = (math.inf if real > 0 else -math.inf), Fraction(0)
    sign = float((rest > 0) - (rest < 0))
    return torch.tensor([head], dtype=torch.float64, device="cpu"), torch.tensor([sign], dtype=torch.float64, device="cpu")


def _real_number(side: Multiplicand, i: int, j: int) -> Fraction:
    column = side.lora_A[:, j].double()
    if side.lora_B is None:
        return Fraction(float(column[i]))
    pairs = zip(side.lora_B[i].double().tolist(), column.tolist(), strict=True)
    return sum((Fraction(b) * Fraction(a) for b, a in pairs), Fraction(0))

"""`merge_weight`: W + Σ scaling · B A, accumulated wide in tiles of rows and rounded once.

Every merge in lorafold, of a layer, of a tensor in a file, of a shard, ends here; or in `stream`, which gives rows of files to the
same compiled functions, and leaves to this one what they do not do. A tile is some hundred thousand elements, so that its few
buffers stay in the cache while they are widened, added to and rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..arithmetic import full_precision, one_thread, subnormal_numbers
from ..errors import UpdateError
from .arguments import check_pair, check_updates, check_weight
from .cpu.compiled import merge_native
from .cuda import merge_gpu
from .exact import exact_tile, wide_dtype
from .factors import Factors, stack
from .rounding import HALVES, Rounding, Stochastic, noise_of, to_nearest, to_stochastic
from .stats import Kept
from .torch_tiles import scratch_for
from .update import LowRankUpdate

Precision = Literal["fast", "exact"]

_TILE_BYTES = {"cpu": 1 << 21}  # of each wide buffer; there are up to five
_TILE_BYTES_ON_DEVICE = 1 << 26
_CAST = 1 << 16  # elements that are rounded at once


def merge_weight(
    weight: Tensor,
    updates: Sequence[LowRankUpdate],
    *,
    out: Tensor | None = None,
    precision: Precision = "exact",
    rounding: Rounding = "nearest",
) -> Tensor:
    """round(W + Σ scaling_i · B_i A_i), rounded once to the dtype of `out`.

    - `weight`: W, (out_features, in_features), bfloat16, float16, float32 or float64; strides are free
    - `updates`: each of W's shape, on W's device; none is fine. Their order does not change a bit
    - `out`: where the result goes, of W's shape; it may be W itself. By default a new tensor of W's dtype
    - `precision`: ``"exact"`` gives the correctly rounded value of the real sum, the same bits on every machine, a sum that is zero
      as +0; ``"fast"`` accumulates in float32 (float64 where W or `out` is float64) and rounds once, and a last bit may differ from
      machine to machine
    - `rounding`: ``"nearest"`` (ties to even), ``"stochastic"``, or a `Stochastic` with seed and tensor name; stochastic rounding
      concerns bfloat16 and float16 only

    Raises `UpdateError` where shapes, dtypes or devices do not fit. Autograd is not involved.

    >>> W = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    >>> merge_weight(W, [LowRankUpdate(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]]), scaling=2.0)])
    tensor([[2., 2.]], dtype=torch.bfloat16)
    """
    return _checked(weight, updates, out, _Manner(precision, rounding, measured=False))[0]


def merge_measured(
    weight: Tensor,
    updates: Sequence[LowRankUpdate],
    *,
    out: Tensor | None = None,
    precision: Precision = "exact",
    rounding: Rounding = "nearest",
) -> tuple[Tensor, Kept]:
    """`merge_weight`, and in the same pass how much of the update survived the rounding.

    >>> W = torch.tensor([[1.0]], dtype=torch.bfloat16)  # its neighbours are 2⁻⁷ away
    >>> merge_measured(W, [LowRankUpdate(torch.ones(1, 1), torch.ones(1, 1), scaling=2**-9)])[1].share
    0.0
    """
    return _checked(weight, updates, out, _Manner(precision, rounding))


def merge_rows(
    weight: Tensor, factors: Factors | None, first: int, *, out: Tensor, precision: Precision, rounding: Rounding = "nearest"
) -> Kept:
    """`merge_measured` for some rows of a matrix whose updates are stacked already; returns what was kept.

    - `weight`, `out`: (rows, in_features), the rows from `first` on
    - `factors`: of the whole matrix, from `stack`; None where nothing is added

    Raises `UpdateError` as `merge_weight` does.
    """
    check_pair(weight, out, precision)
    if factors is not None and (factors.shape[1] != weight.shape[1] or factors.shape[0] < first + weight.shape[0]):
        raise UpdateError(
            f"an update of shape {factors.shape} has no rows {first} to {first + weight.shape[0]} of {weight.shape[1]}"
        )
    return _merge(weight, factors, first, out, _Manner(precision, rounding))


class _Manner(NamedTuple):
    """How a sum is computed and rounded, and whether what the rounding kept is measured."""

    precision: Precision
    rounding: Rounding
    measured: bool = True


def _checked(weight: Tensor, updates: Sequence[LowRankUpdate], out: Tensor | None, manner: _Manner) -> tuple[Tensor, Kept]:
    check_weight(weight)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    check_pair(weight, out, manner.precision)
    updates = check_updates(weight, updates, out)
    with torch.no_grad(), subnormal_numbers(), one_thread():
        factors = stack(updates) if updates else None
    return out, _merge(weight, factors, 0, out, manner)


def _merge(weight: Tensor, factors: Factors | None, first: int, out: Tensor, manner: _Manner) -> Kept:
    matrix, result, precision, measured = weight, out, manner.precision, manner.measured
    noise = noise_of(manner.rounding, out.dtype)
    with torch.no_grad(), subnormal_numbers():
        if factors is None or not weight.numel():
            if weight.dtype != torch.float64 or out.dtype not in HALVES:
                out.copy_(weight)
                return Kept()
            for rows in _tiles(weight, max(1, _CAST // max(1, weight.shape[1]))):
                out[rows] = to_nearest(weight[rows], out.dtype)
            return Kept()
        if noise is None and weight.stride(0) == out.stride(0) == 1 and not out.is_contiguous():
            rows = slice(first, first + weight.shape[0])  # contiguous rows; no bit of `exact` depends on it
            matrix, result, factors, first = weight.T, out.T, factors.rows(rows).T, 0
        if not matrix.is_cuda:
            by_native = merge_native(matrix, result, factors, first, precision=precision, noise=noise, measured=measured)
            if by_native is not None:
                return by_native  # without a matmul of torch's
    with full_precision(weight.device), subnormal_numbers(workers=not weight.is_cuda):
        by_gpu = None
        if noise is None and matrix.is_cuda:
            by_gpu = merge_gpu(matrix, result, factors, first, precision=precision, measured=measured)
        return by_gpu or _merge_by_torch(matrix, factors, first, result, noise, manner)


def _merge_by_torch(
    matrix: Tensor, factors: Factors, first: int, result: Tensor, noise: Stochastic | None, manner: _Manner
) -> Kept:
    """`_merge`, tile by tile."""
    target = torch.float32 if noise is not None else result.dtype  # what the sum is rounded to before noise decides
    exact = manner.precision == "exact"
    wide = wide_dtype(target, matrix.dtype, factors.r) if exact else _fast_dtype(matrix, result)
    kept = Kept()
    rows_B, columns_A = factors.scaled_B(wide), factors.wide_A(wide)
    scratch = scratch_for(_tile_rows(matrix, wide), matrix.shape[1], wide, target, matrix.device)
    for rows in _tiles(matrix, scratch.rows):
        of_update = slice(first + rows.start, first + rows.stop)
        base = scratch.take(2, matrix[rows]).copy_(matrix[rows])  # a copy, since out may be the weight
        delta = torch.mm(rows_B[of_update], columns_A, out=scratch.take(3, base))
        if not exact:
            merged = torch.add(base, delta, out=scratch.take(0, base))
        else:
            apart = noise is not None or not result.is_contiguous() or result.is_neg()  # a negated view has other bits
            merged = scratch.merged(base) if apart else result[rows]
            exact_tile(base, delta, of_update, factors, scratch, merged)
        if noise is not None:
            start = noise.start + rows.start * matrix.shape[1]
            merged = to_stochastic(merged.float(), result.dtype, Stochastic(noise.seed, noise.tensor, start))
        if merged.data_ptr() != result[rows].data_ptr():
            result[rows] = merged
        if manner.measured:
            kept += _survived(scratch.take(0, base).copy_(result[rows]), base, delta)
    return kept


def _survived(merged: Tensor, base: Tensor, delta: Tensor) -> Kept:
    """The inner products of one tile; `merged` is used up."""
    moved, delta = merged.sub_(base).view(-1), delta.view(-1)
    return Kept(float(torch.dot(moved, delta)), float(torch.dot(delta, delta)))


def _fast_dtype(weight: Tensor, out: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (weight.dtype, out.dtype) else torch.float32


def _tile_rows(weight: Tensor, wide: torch.dtype) -> int:
    size = _TILE_BYTES.get(weight.device.type, _TILE_BYTES_ON_DEVICE) // wide.itemsize
    return max(1, min(weight.shape[0], size // max(1, weight.shape[1])))


def _tiles(weight: Tensor, step: int) -> Iterator[slice]:
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))

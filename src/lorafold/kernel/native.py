"""The compiled kernel: how a merge is handed to it.

Wherever it does not apply, `merge_native` returns None, and merge.py and exact.py do the work with torch; in `exact` with the same
bits.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .compiled import How, Job, build
from .exact import SLACK, TINY, UNIT, Bound, error_bound, settle
from .factors import Factors
from .kept import Kept
from .numerics import one_thread
from .rounding import HALVES

_HIGH_RANK = {torch.bfloat16: 256, torch.float16: 32}
"""Up to this rank sums in float32 leave so few elements of this dtype open that they are faster than sums in float64."""

_CHUNK = 1 << 20  # elements done in one call; each needs six to eight bytes of address space, in case all stay open
_ALONE = 1 << 17  # elements that are not worth waking another thread for
_WIDEST = 1 << 24  # columns: places in a chunk are numbers of 32 bits


@dataclass(frozen=True, eq=False)
class Open:
    """Elements that are still to be settled: their flat `places` in the matrix, and what the weight was there; (n,) both."""

    places: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Factors as the compiled kernel reads them; `struct job` of native.c says what the fields are."""

    packed_B: Tensor
    packed_A: Tensor


@dataclass(frozen=True, eq=False)
class Bounded:
    """What `exact` needs of them besides."""

    bound: Bound
    row_errors: Tensor
    column_errors: Tensor
    scaled_B: Tensor
    lora_A: Tensor


def merge_native(
    weight: Tensor, out: Tensor, factors: Factors, first: int = 0, *, precision: Literal["fast", "exact"], measured: bool = True
) -> Kept | None:
    """Fill `out` with round(W + ΔW), by ``"exact"`` correctly rounded to its dtype; None, and nothing done, where that takes torch.

    - `weight`, `out`: (rows, in) both; `out` may be the weight
    - `factors`: of the rows from `first` on, and maybe of more
    - `measured`: whether the inner products are asked for

    As many threads work as torch would use. The bits depend on neither the threads nor how the rows are cut.
    """
    exact = precision == "exact"
    used, wide = build(), _wide_dtype(out.dtype, factors.r) if exact else torch.float32
    how: How = ("float" if wide == torch.float32 else "double") if exact else "fast"
    function = used.function(weight.dtype, out.dtype, how) if used else None
    if used is None or function is None or not (_addressable(weight) and _addressable(out)):
        return None
    height, lanes = used.number("rows"), used.lanes(wide)
    rows, columns = weight.shape
    if first % height or (rows % height and first + rows < factors.shape[0]):  # blocks of rows must be those that are packed
        first, factors = 0, factors.rows(slice(first, first + rows))
    bounded: Bounded | None = None
    with one_thread():
        if exact:
            bounded = factors.once(
                ("bounded", used.name, wide), lambda: _bounded(factors, wide, height, lanes, used.number("span"))
            )
            if bounded is None:
                return None
        packed = factors.once(("packed", used.name, wide), lambda: _pack(factors, wide, height, lanes))

    def job_of(start: int, count: int) -> Job:
        return Job(
            weight=weight.data_ptr() + start * weight.stride(0) * weight.element_size(),
            out=out.data_ptr() + start * out.stride(0) * out.element_size(),
            packed_B=packed.packed_B[(first + start) // height :].data_ptr(),
            packed_A=packed.packed_A.data_ptr(),
            measured=measured,
            weight_stride=weight.stride(0),
            out_stride=out.stride(0),
            rows=count,
            columns=columns,
            r=factors.r,
        )

    def merge(start: int) -> tuple[Kept, Open | None]:
        """Do the rows from `start` on."""
        count = min(each, rows - start)
        job = job_of(start, count)
        if bounded is None:
            function(ctypes.byref(job))
            return Kept(job.dot, job.square), None
        places = torch.empty(count * columns, dtype=torch.int32)
        before = torch.empty(count * columns, dtype=weight.dtype)
        job.row_errors = bounded.row_errors[first + start :].data_ptr()
        job.column_errors = bounded.column_errors.data_ptr()
        job.scaled_B = bounded.scaled_B[first + start :].data_ptr()
        job.lora_A = bounded.lora_A.data_ptr()
        job.lora_A_strides = bounded.lora_A.stride()
        job.relative = _relative(wide, out.dtype)
        job.unit = (factors.r + 6) * UNIT[torch.float64] * SLACK
        job.tiny = factors.r * TINY[torch.float64] * (1 + bounded.bound.largest) * SLACK
        job.open, job.open_weight = places.data_ptr(), before.data_ptr()
        function(ctypes.byref(job))
        opened = Open(places[: job.opened].long() + start * columns, before[: job.opened].clone()) if job.opened else None
        return Kept(job.dot, job.square), opened

    threads = torch.get_num_threads()
    size = min(_CHUNK, max(_ALONE, weight.numel() // threads))  # of a chunk
    each = max(1, size // columns // height) * height  # rows
    starts = range(0, rows, each)
    kept = Kept()
    left: list[Open] = []
    for inner, opened in (_pool(threads).map if threads > 1 and len(starts) > 1 else map)(merge, starts):
        kept += inner
        left += [] if opened is None else [opened]
        if sum(part.places.numel() for part in left) > _CHUNK:
            kept += _settle_open(out, left, factors, first)
            left.clear()
    kept += _settle_open(out, left, factors, first)
    torch.autograd.graph.increment_version(out)
    return kept


def _pack(factors: Factors, wide: torch.dtype, height: int, lanes: int) -> Packed:
    """`factors` for blocks of `height` rows and vectors of `lanes`."""
    return Packed(_packed(factors.scaled_B(wide).T, height), _packed(factors.wide_A(wide), lanes))


def _bounded(factors: Factors, wide: torch.dtype, height: int, lanes: int, span: int) -> Bounded | None:
    """Their bounds; None where intermediate numbers might overflow `wide`."""
    bound = error_bound(factors, wide, min(factors.r, span) + -(-factors.r // span) - 1)
    if not bound.safe:
        return None
    return Bounded(
        bound=bound,
        row_errors=_whole(bound.rows, height).contiguous(),
        column_errors=_whole(bound.columns, lanes).contiguous(),
        scaled_B=factors.scaled_B(torch.float64).contiguous(),
        # many elements are settled after sums in float32, and each reads a column of A; hardly any after sums in float64
        lora_A=factors.lora_A.T.contiguous().T if wide == torch.float32 else factors.lora_A,
    )


def _settle_open(out: Tensor, left: list[Open], factors: Factors, first: int) -> Kept:
    """Settle what was left open; what that adds to the inner products."""
    if not left:
        return Kept()
    factors = factors.rows(slice(first, first + out.shape[0]))
    places = torch.cat([part.places for part in left])
    where = (places // out.shape[1], places % out.shape[1])
    merged, delta = settle(places, torch.cat([part.weight for part in left]), out.shape[1], factors, out.dtype)
    moved = merged.double() - out[where].double()
    out[where] = merged
    return Kept(float(torch.dot(moved, delta)))


def _wide_dtype(target: torch.dtype, r: int) -> torch.dtype:
    """The dtype that the sums are kept in."""
    return torch.float32 if r < _HIGH_RANK.get(target, 0) else torch.float64


def _relative(wide: torch.dtype, target: torch.dtype) -> float:
    """What the last rounding adds to a sum's error, see slack_ in native_tile.h; a half comes from float64 by way of float32."""
    return 1.25 * UNIT[torch.float32 if target in HALVES else wide]


def _addressable(matrix: Tensor) -> bool:
    """Whether its elements lie in memory as the kernel takes them: numbers on the CPU, rows contiguous."""
    return (
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.device.type == "cpu"
        and not matrix.is_neg()
        and matrix.stride(1) == 1
        and 0 < matrix.shape[1] <= _WIDEST
    )


def _packed(matrix: Tensor, lanes: int) -> Tensor:
    """(n / lanes, R, lanes), contiguous, of an (R, n) matrix: the numbers of a vector together; zeros fill the last."""
    return _whole(matrix, lanes).reshape(len(matrix), -1, lanes).transpose(0, 1).contiguous()


def _whole(matrix: Tensor, lanes: int) -> Tensor:
    """`matrix` with zeros up to a multiple of `lanes` in its last dimension."""
    missing = -matrix.shape[-1] % lanes
    return pad(matrix, (0, missing)) if missing else matrix


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: to start them costs as much as a small merge."""
    return ThreadPoolExecutor(threads, "lorafold-exact")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork takes no threads along

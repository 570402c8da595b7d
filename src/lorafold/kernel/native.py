"""The compiled kernel: how a merge is handed to it.

Wherever it does not apply, `merge_native` returns None, and merge.py and exact.py do the work with torch; in `exact` with the same
bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .compiled import How, Job, build
from .exact import SLACK, UNIT, error_bound, settle
from .factors import Factors
from .kept import Kept
from .numerics import one_thread
from .rounding import HALVES
from .team import together

_HIGH_RANK = {torch.bfloat16: 256, torch.float16: 128}
"""Below this rank sums in float32 leave so few elements of this dtype open that they are faster than sums in float64."""

_CHUNK = 1 << 21  # elements of one job; each needs six to eight bytes of address space, in case all stay open
_TURNS = 4  # jobs that each thread has in one go
_ALONE = 1 << 16  # elements that are not worth another thread
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

    row_errors: Tensor
    column_errors: Tensor
    largest_column_error: float
    scaled_B: Tensor
    share: float


def merge_native(
    weight: Tensor, out: Tensor, factors: Factors, first: int = 0, *, precision: Literal["fast", "exact"], measured: bool = True
) -> Kept | None:
    """Fill `out` with round(W + ΔW), by ``"exact"`` correctly rounded to its dtype; None, and nothing done, where that takes torch.

    - `weight`, `out`: (rows, in) both; `out` may be the weight
    - `factors`: of the rows from `first` on, and maybe of more
    - `measured`: whether the inner products are asked for

    As many threads work as torch would use. The bits depend on neither the threads nor how the rows are cut.
    """
    exact, used = precision == "exact", build()
    if used is None or not (_addressable(weight) and _addressable(out)):
        return None
    wide = _wide_dtype(out.dtype, factors) if exact else torch.float32
    how: How = ("float" if wide == torch.float32 else "double") if exact else "fast"
    function = used.function(weight.dtype, out.dtype, how)
    if function is None:
        return None
    height, width = used.number("rows"), used.width(wide)
    rows, columns = weight.shape
    if first % height or (rows % height and first + rows < factors.shape[0]):  # blocks of rows must be those that are packed
        first, factors = 0, factors.rows(slice(first, first + rows))
    bounded: Bounded | None = None
    with one_thread():
        if exact:
            bounded = factors.once(
                ("bounded", used.name, wide), lambda: _bounded(factors, wide, height, width, used.number("span"))
            )
            if bounded is None:
                return None
        packed = factors.once(("packed", used.name, wide), lambda: _pack(factors, wide, height, width))

    whole = Job(
        packed_A=packed.packed_A.data_ptr(),
        measured=measured,
        weight_stride=weight.stride(0),
        out_stride=out.stride(0),
        columns=columns,
        r=factors.r,
    )
    if bounded is not None:
        whole.column_errors = bounded.column_errors.data_ptr()
        whole.largest_column_error = bounded.largest_column_error
        whole.unit = 3 * UNIT[torch.float64] * SLACK  # adding the weight is rounded, and so is each end
        whole.share = bounded.share

    weight_at, out_at, packed_at = weight.data_ptr(), out.data_ptr(), packed.packed_B.data_ptr()
    errors_at, scaled_at = (0, 0) if bounded is None else (bounded.row_errors.data_ptr(), bounded.scaled_B.data_ptr())

    def begin(job: Job, start: int, count: int) -> None:
        """Make `job` one for the `count` rows from `start` on."""
        job.rows = count
        job.weight = weight_at + start * weight.stride(0) * weight.element_size()
        job.out = out_at + start * out.stride(0) * out.element_size()
        job.packed_B = packed_at + (first + start) * factors.r * wide.itemsize
        if bounded is not None:
            job.row_errors = errors_at + (first + start) * wide.itemsize
            job.scaled_B = scaled_at + (first + start) * factors.r * torch.float64.itemsize

    threads = torch.get_num_threads()
    each = max(1, min(_CHUNK, max(_ALONE, weight.numel() // (_TURNS * threads))) // columns // height) * height  # rows of a job
    starts = range(0, rows, each)
    kept = Kept()
    left: list[Open] = []
    for group in (starts[i : i + _TURNS * threads] for i in range(0, len(starts), _TURNS * threads)):
        jobs = (Job * len(group))(*[whole] * len(group))
        for job, start in zip(jobs, group, strict=True):
            begin(job, start, min(each, rows - start))
        rooms = [] if bounded is None else [_room_for_open(job, weight.dtype) for job in jobs]
        together(used, function, jobs)
        kept = sum((Kept(job.dot, job.square) for job in jobs), kept)
        for job, start, (places, before) in zip(jobs, group, rooms, strict=False):  # none of `fast`
            if job.opened:
                left.append(Open(places[: job.opened].long() + start * columns, before[: job.opened].clone()))
        if sum(part.places.numel() for part in left) > _CHUNK:
            kept += _settle_open(out, left, factors, first)
            left.clear()
    kept += _settle_open(out, left, factors, first)
    torch.autograd.graph.increment_version(out)
    return kept


def _room_for_open(job: Job, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for all places of `job` that may stay open, and for the weights there, of `dtype`; told to the job."""
    places = torch.empty(job.rows * job.columns, dtype=torch.int32)
    before = torch.empty(job.rows * job.columns, dtype=dtype)
    job.open, job.open_weight = places.data_ptr(), before.data_ptr()
    return places, before


def _pack(factors: Factors, wide: torch.dtype, height: int, width: int) -> Packed:
    """`factors` for blocks of `height` rows and `width` columns."""
    return Packed(_packed(factors.scaled_B(wide).T, height), _packed(factors.wide_A(wide), width))


def _bounded(factors: Factors, wide: torch.dtype, height: int, width: int, span: int) -> Bounded | None:
    """Their bounds; None where intermediate numbers might overflow `wide`."""
    roundings = _roundings(factors, wide, span)
    bound = error_bound(factors, wide, roundings)
    if not bound.safe:
        return None
    return Bounded(
        row_errors=_whole(bound.rows, height).contiguous(),
        column_errors=_whole(bound.columns, width).contiguous(),
        largest_column_error=float(bound.columns.max()),
        scaled_B=factors.scaled_B(torch.float64).contiguous(),
        share=(factors.r + 6) * UNIT[torch.float64] / (float(roundings.min()) * UNIT[wide]),
    )


def _roundings(factors: Factors, wide: torch.dtype, span: int) -> Tensor:
    """(R,) how many roundings each product of ΔW goes through at most: its own, those of the additions, and that of s·B.

    That s·B was rounded to float64 counts in sums of float64, and lies in `SLACK` otherwise.
    """
    sums = _roundings_of_sums(factors.r, span if wide == torch.float32 else factors.r)
    return sums if wide == torch.float32 and _is_shift(factors) else sums + 1


@lru_cache(256)
def _roundings_of_sums(r: int, span: int) -> Tensor:
    """(r,) float64. In a span of products the first is rounded alone, or as it is added to zero, and then there are additions; then
    the spans are added up, the first without an error."""
    place, before = torch.arange(r, device="cpu") % span, torch.arange(r, device="cpu") // span
    length = (r - before * span).clamp(max=span)
    return (length - (place - 1).clamp(min=0) + (-(-r // span) - before.clamp(min=1))).double()


def _is_shift(factors: Factors) -> bool:
    """Whether s·B is B but for its exponents, and no longer than float32 holds."""
    narrow = factors.given_B.dtype in (*HALVES, torch.float32)
    return narrow and factors.uniform is not None and abs(math.frexp(factors.uniform)[0]) == 0.5


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


def _wide_dtype(target: torch.dtype, factors: Factors) -> torch.dtype:
    """The dtype that the sums of `exact` are kept in: one that holds A as it is."""
    narrow = factors.r < _HIGH_RANK.get(target, 0) and factors.once("A in float32", lambda: _is_narrow(factors.given_A))
    return torch.float32 if narrow else torch.float64


def _is_narrow(matrix: Tensor) -> bool:
    """Whether float32 holds every number of `matrix` as it is."""
    return matrix.dtype in (*HALVES, torch.float32) or torch.equal(matrix.float().double(), matrix.double())


def _addressable(matrix: Tensor) -> bool:
    """Whether its elements lie in memory as the kernel takes them: numbers on the CPU, rows contiguous."""
    return (
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.device.type == "cpu"
        and not matrix.is_neg()
        and matrix.stride(1) == 1
        and 0 < matrix.shape[1] <= _WIDEST
    )


def _packed(matrix: Tensor, size: int) -> Tensor:
    """(n / size, R, size), contiguous, of an (R, n) matrix: the numbers of a block together; zeros fill the last."""
    return _whole(matrix, size).reshape(len(matrix), -1, size).transpose(0, 1).contiguous()


def _whole(matrix: Tensor, size: int) -> Tensor:
    """`matrix` with zeros up to a multiple of `size` in its last dimension."""
    missing = -matrix.shape[-1] % size
    return pad(matrix, (0, missing)) if missing else matrix

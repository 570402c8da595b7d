"""The compiled kernel: how a merge is handed to it.

Wherever it does not apply, `merge_native` returns None, and merge.py and exact.py do the work with torch; in `exact` with the same
bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...arithmetic import one_thread
from ..exact import settle
from ..factors import Factors
from ..rounding import Stochastic, to_stochastic_at
from ..stats import Kept
from .loader import MergeJob, build
from .packing import in_blocks, prepare
from .parallel import run_parallel
from .pointers import address, is_memory

_CHUNK = 1 << 30  # elements of one job at most, whose places are numbers of 32 bits
_TURNS = 4  # jobs that each thread has, so that one that is slowed down leaves some to others
_ROOM = 1 << 16  # elements that a job may leave undecided before they are taken from it
_MANY = 1 << 21  # undecided elements that are settled before there are more of them
_ALONE = 1 << 16  # elements that are not worth another thread
_WIDEST = 1 << 24  # columns


@dataclass(frozen=True, eq=False)
class Undecided:
    """Elements that are still to be settled: their flat `places` in the matrix, and what the weight was there; (n,) both."""

    places: Tensor
    weight: Tensor


def merge_native(
    weight: Tensor,
    out: Tensor,
    factors: Factors,
    first: int = 0,
    *,
    precision: Literal["fast", "exact"],
    noise: Stochastic | None = None,
    measured: bool = True,
) -> Kept | None:
    """Fill `out` with round(W + ΔW), by ``"exact"`` correctly rounded to its dtype; None, and nothing done, where that takes torch.

    - `weight`, `out`: (rows, in) both; `out` may be the weight
    - `factors`: of the rows from `first` on, and maybe of more
    - `noise`: what decides how sums in float32 are rounded; None, and they are rounded to nearest
    - `measured`: whether the inner products are asked for

    As many threads work as torch would use. The bits depend on neither the threads nor how the rows are cut.
    """
    used = build()
    if used is None or not (_addressable(weight) and _addressable(out)):
        return None
    height, (rows, columns) = used.number("rows"), weight.shape
    if not in_blocks(factors, first, rows, height):  # blocks of rows must be those that are packed
        first, factors = 0, factors.rows(slice(first, first + rows))
    with one_thread():
        prepared = prepare(used, weight.dtype, out.dtype, factors, precision, stochastic=noise is not None)
    if prepared is None:
        return None

    threads = torch.get_num_threads()
    shares = _TURNS * threads if threads > 1 else 1
    each = max(1, min(_CHUNK, max(_ALONE, weight.numel() // shares)) // columns // height) * height  # rows of a job
    starts = range(0, rows, each)
    jobs, room = (MergeJob * len(starts))(), max(_ROOM, height * columns)  # no job goes on without room for a whole strip
    rooms = [room_for_undecided(room, weight.dtype) for _ in starts if precision == "exact"]
    for job, start in zip(jobs, starts, strict=True):
        _begin(job, weight, out, start, min(each, rows - start))
        job.measured = measured
        if noise is not None:
            job.first, job.key = noise.start + start * columns, noise.key
        prepared.blocks.into(job, first + start)
    for job, (places, before) in zip(jobs, rooms, strict=False):  # none of `fast`
        job.undecided, job.undecided_weight, job.room = address(places, torch.int32), address(before, weight.dtype), room
    kept = Kept()
    left: list[Undecided] = []
    while any(job.column < columns for job in jobs):
        run_parallel(used, prepared.function, jobs)
        kept = sum((Kept(job.dot, job.square) for job in jobs), kept)
        for job, start, (places, before) in zip(jobs, starts, rooms, strict=False):
            if job.undecided_count:
                left.append(
                    Undecided(places[: job.undecided_count].long() + start * columns, before[: job.undecided_count].clone())
                )
        if sum(part.places.numel() for part in left) > _MANY:
            kept += _settle_undecided(out, left, factors, first, noise)
            left.clear()
    kept += _settle_undecided(out, left, factors, first, noise)
    if not out.is_inference():  # then no graph can have kept it
        torch.autograd.graph.increment_version(out)
    return kept


def _begin(job: MergeJob, weight: Tensor, out: Tensor, start: int, count: int) -> None:
    """Make `job` one for the `count` rows from `start` on."""
    job.rows, job.columns = count, weight.shape[1]
    job.weight_stride, job.out_stride = weight.stride(0), out.stride(0)
    job.weight, job.out = address(weight, weight.dtype, start), address(out, out.dtype, start)


def room_for_undecided(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the places of `count` elements that stay undecided, and for what the weight, of `dtype`, was there."""
    return torch.empty(count, dtype=torch.int32, device="cpu"), torch.empty(count, dtype=dtype, device="cpu")


def _settle_undecided(out: Tensor, left: list[Undecided], factors: Factors, first: int, noise: Stochastic | None) -> Kept:
    """Settle what was left undecided; what that adds to the inner products."""
    if not left:
        return Kept()
    factors = factors.rows(slice(first, first + out.shape[0]))
    places = torch.cat([part.places for part in left])
    where = (places // out.shape[1], places % out.shape[1])
    target = out.dtype if noise is None else torch.float32
    merged, delta = settle(places, torch.cat([part.weight for part in left]), out.shape[1], factors, target)
    if noise is not None:
        merged = to_stochastic_at(places, merged, out.dtype, noise)
    moved = merged.double() - out[where].double()
    out[where] = merged
    return Kept(float(torch.dot(moved, delta)))


def _addressable(matrix: Tensor) -> bool:
    """Whether its elements lie in memory as the kernel takes them: numbers on the CPU, rows contiguous."""
    return is_memory(matrix) and matrix.stride(1) == 1 and 0 < matrix.shape[1] <= _WIDEST

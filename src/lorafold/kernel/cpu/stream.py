"""Merging from file to file in compiled code, where rows go through the processor's cache without leaving it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...arithmetic import subnormal_numbers
from ..factors import Factors
from ..rounding import Rounding, noise_of
from ..stats import Kept
from .codes import CodedRows, LaidOutCodes, decodes
from .compiled import room_for_undecided
from .loader import Function, MergeJob, Sink, Stream, build
from .packing import in_blocks, prepare
from .pointers import address

_THROUGH = 256 * 1024
"""Bytes of rows at once, at least: what is read, and what is made of it, stay in the second-level cache beside a part of A."""

_MOST = 2 * 1024 * 1024
"""And at most. In between they are as many as A, which is fetched once for them."""

_WIDEST = 8 * 1024 * 1024
"""Bytes of the fewest rows that compiled code does at once, beyond which nothing stays in a cache, and memory counts."""

_NEAREST: tuple[Rounding] = ("nearest",)


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows of a matrix of `dtype` that lie one behind the other in the file open as `fd`, from byte `start` on.

    - `found`: (rows · row bytes,) uint8, or None. Where sums go to rows with it, nothing is written: what is in the file is read
      into it, and must be what would be
    """

    fd: int
    start: int
    dtype: torch.dtype
    columns: int
    found: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    def after(self, rows: int) -> FileRows:
        """Those behind the first `rows`."""
        skipped = rows * self.row_bytes
        return replace(self, start=self.start + skipped, found=None if self.found is None else self.found[skipped:])


def through(function: Function, stream: Stream, source: FileRows | CodedRows, *, decoded: bool = True) -> None:
    """Run `stream`, which reads `source`; `decoded`: whether its weights are the numbers of codes that are read."""
    if isinstance(source, CodedRows):
        raw = torch.empty(stream.each * source.row_bytes, dtype=torch.uint8, device="cpu")
        packed = LaidOutCodes(source.codes)
        stream.raw, stream.codes = address(raw, torch.uint8), ctypes.addressof(packed.struct) if decoded else None
    function(ctypes.byref(stream))


def merge_between(
    source: FileRows | CodedRows,
    rows: int,
    targets: Sequence[FileRows],
    updates: Sequence[tuple[Factors, int]],
    *,
    precision: Literal["fast", "exact"],
    roundings: Sequence[Rounding] = (),
) -> tuple[int, list[Kept]]:
    """Read `rows` rows of W from `source`, and write round(W + ΔW) to each of `targets`, with the bits of `merge_rows`.

    - `source`: of numbers, or of codes that stand for numbers
    - `updates`: for each target its ΔW, from `stack`, of a matrix of which the rows are those from the given one on

    - `roundings`: for each target how it is rounded; by default all to nearest

    How many rows went through, from the first on, and what each target kept of its update in them. Where that is not all of
    them, the rest is for `merge_rows`: with the next rows they cannot be read or written, or are not the same, or a number is not
    finite, or left undecided by compiled code; or there is no compiled code for any of them. Rows behind those that went through
    may be overwritten.
    """
    none = 0, [Kept() for _ in targets]
    used = build()
    function = None if used is None else used.stream()
    if used is None or function is None:
        return none
    height, columns = used.number("rows"), source.columns
    row_bytes = max(columns * source.dtype.itemsize, *(target.row_bytes for target in targets))
    if isinstance(source, CodedRows) and not decodes(used, source.codes):
        return none
    if not rows or not 0 < height * row_bytes <= _WIDEST:
        return none
    if not all(in_blocks(factors, first, rows, height) for factors, first in updates):
        return none
    if not all(target.found is None or target.found.numel() >= rows * target.row_bytes for target in targets):
        return none
    noises = [
        noise_of(rounding, target.dtype) for target, rounding in zip(targets, roundings or _NEAREST * len(targets), strict=True)
    ]
    with torch.no_grad(), subnormal_numbers():
        prepared = [
            prepare(used, source.dtype, target.dtype, factors, precision, stochastic=noise is not None)
            for target, (factors, _), noise in zip(targets, updates, noises, strict=True)
        ]
    ready = [each for each in prepared if each is not None]
    if len(ready) < len(targets):
        return none
    size = min(max(_THROUGH, *(each.blocks.packed_A.nbytes for each in ready)), _MOST)
    each_time = min(max(1, size // row_bytes // height), -(-rows // height)) * height
    weight = torch.empty(each_time * columns, dtype=source.dtype, device="cpu")
    out = torch.empty(each_time * row_bytes, dtype=torch.uint8, device="cpu")
    places, before = room_for_undecided(height * columns, source.dtype)
    jobs, sinks = (MergeJob * len(ready))(), (Sink * len(ready))()
    for job, sink, target, (_, first), how, noise in zip(jobs, sinks, targets, updates, ready, noises, strict=True):
        job.weight, job.out = address(weight, source.dtype), address(out, torch.uint8)
        job.weight_stride = job.out_stride = columns
        job.rows, job.columns, job.measured = rows, columns, True
        job.undecided, job.undecided_weight = address(places, torch.int32), address(before, source.dtype)
        job.room = places.numel()
        if noise is not None:
            job.first, job.key = noise.start, noise.key
        how.blocks.into(job, first)
        sink.function = ctypes.cast(how.function, ctypes.c_void_p)
        sink.job, sink.wide = ctypes.addressof(job), how.wide.itemsize
        sink.to, sink.to_at, sink.to_row = target.fd, target.start, target.row_bytes
        sink.found = None if target.found is None else address(target.found, torch.uint8)
    stream = Stream(source.fd, source.start, source.row_bytes, rows, each_time, ctypes.addressof(sinks), len(sinks))
    through(function, stream, source)
    return stream.done, [Kept(sink.dot, sink.square) for sink in sinks]

"""Merging from file to file in compiled code, where rows go through the processor's cache without leaving it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .compiled import Job, Passage, build
from .factors import Factors
from .kept import Kept
from .native import room_for_open
from .packing import in_blocks, prepare

_THROUGH = 256 * 1024
"""Bytes of rows at once, at least: what is read, and what is made of it, stay in the second-level cache beside a part of A."""

_MOST = 2 * 1024 * 1024
"""And at most. In between they are as many as A, which is fetched once for them."""

_WIDEST = 8 * 1024 * 1024
"""Bytes of the fewest rows that compiled code does at once, beyond which nothing stays in a cache, and memory counts."""


@dataclass(frozen=True)
class FileRows:
    """Rows of a matrix of `dtype` that lie one behind the other in the file open as `fd`, from byte `start` on."""

    fd: int
    start: int
    dtype: torch.dtype
    columns: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    def after(self, rows: int) -> FileRows:
        """Those behind the first `rows`."""
        return replace(self, start=self.start + rows * self.row_bytes)


def merge_between(
    source: FileRows,
    target: FileRows,
    rows: int,
    factors: Factors,
    first: int,
    *,
    precision: Literal["fast", "exact"],
    found: Tensor | None = None,
) -> tuple[int, Kept]:
    """Read rows of W from `source`, and write round(W + ΔW) to `target`, with the bits of `merge_rows`.

    - `rows`: how many; `factors`: from `stack`, of a matrix of which they are the rows from `first` on
    - `found`: (rows · row bytes,) uint8; nothing is written then: what `target` holds is read into it, and must be what would be
      written

    How many rows went through, from the first on, and what they kept of the update. Where that is not all of them, the rest is for
    `merge_rows`: the next rows cannot be read or written, or are not the same, or hold a number that is not finite, or one that
    compiled code leaves open; or there is no compiled code for any of them. Rows behind those that went through may be overwritten.
    """
    used = build()
    function = None if used is None else used.passage()
    if used is None or function is None:
        return 0, Kept()
    height, columns, row_bytes = used.number("rows"), source.columns, max(source.row_bytes, target.row_bytes)
    if not rows or not 0 < height * row_bytes <= _WIDEST or not in_blocks(factors, first, rows, height):
        return 0, Kept()
    prepared = prepare(used, source.dtype, target.dtype, factors, precision)
    if prepared is None:
        return 0, Kept()
    blocks = prepared.blocks
    size = min(max(_THROUGH, blocks.packed_A.nbytes), _MOST)
    each = min(max(1, size // row_bytes // height), -(-rows // height)) * height
    weight, out = (torch.empty(each * columns, dtype=end.dtype) for end in (source, target))
    places, before = room_for_open(height * columns, source.dtype)
    job = Job(weight=weight.data_ptr(), out=out.data_ptr(), weight_stride=columns, out_stride=columns, rows=rows, columns=columns)
    job.measured, job.open, job.open_weight, job.room = True, places.data_ptr(), before.data_ptr(), places.numel()
    blocks.into(job, first)
    passage = Passage(
        function=ctypes.cast(prepared.function, ctypes.c_void_p),  # type: ignore[arg-type]
        job=ctypes.addressof(job),
        **{"from": source.fd, "from_at": source.start, "from_row": source.row_bytes},
        to=target.fd,
        to_at=target.start,
        to_row=target.row_bytes,
        found=None if found is None else found.data_ptr(),
        wide=prepared.wide.itemsize,
        each=each,
    )
    function(ctypes.byref(passage))
    return passage.done, Kept(passage.dot, passage.square)

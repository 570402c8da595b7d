"""Jobs on rows, in memory and from file to file: what `rescaling` and `multiplying` have in common; see rows.h."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..rounding import Stochastic
from ..stats import Kept
from .loader import CODES, Build, Function, Rows, RowStream
from .pointers import address, is_memory
from .stream import FileRows

_THROUGH = 256 * 1024
"""Bytes of rows at once, at least a strip of them."""


class RowJob(Protocol):
    """A job that begins with `struct rows`."""

    all: Rows


@dataclass(frozen=True)
class Manner:
    """How rows are stored.

    - `first`: the row of the whole matrix that is the first of them
    - `target`: the dtype; None where nothing is stored
    - `noise`: what decides how they are rounded, its start that of the first row; None, and they are rounded to nearest
    """

    first: int
    target: torch.dtype | None
    noise: Stochastic | None = None

    def into(self, rows: Rows, source: torch.dtype, columns: int) -> None:
        """Tell `rows`, which are of `source`; where they lie is still to be said."""
        rows.row, rows.columns = self.first, columns
        rows.weight_dtype, rows.out_dtype = CODES[source], CODES[self.target or torch.float64]
        rows.weight_stride = rows.out_stride = columns
        if self.noise is not None:
            rows.stochastic, rows.key = True, self.noise.key
            rows.first = (self.noise.start - self.first * columns) % (1 << 64)


class Within(NamedTuple):
    """Which of the rows that are read are stored, from `low` to before `high`, and how many must be done `together`."""

    low: int
    high: int
    together: int


def in_memory(rows: Rows, matrix: Tensor, out: Tensor, start: int, count: int) -> None:
    """Tell `rows` that they are `count` rows of `matrix` from `start` on, and go to those of `out`."""
    rows.weight, rows.out = address(matrix, matrix.dtype, start), address(out, out.dtype, start)
    rows.weight_stride, rows.out_stride, rows.rows = matrix.stride(0), out.stride(0), count
    rows.row += start


def addressable(matrix: Tensor) -> bool:
    """Whether its numbers lie in memory as compiled code takes them."""
    return is_memory(matrix) and matrix.dtype in CODES and matrix.stride(1) == 1


def streams(used: Build | None, source: FileRows, rows: int, target: FileRows | None) -> bool:
    """Whether `used` takes `rows` rows from `source` to `target`."""
    if used is None or used.row_stream is None or not rows or source.dtype not in CODES:
        return False
    if target is None:
        return True
    return target.dtype in CODES and (target.found is None or target.found.numel() >= rows * target.row_bytes)


def through(
    used: Build,
    function: Function,
    job: RowJob,
    source: FileRows,
    rows: int,
    target: FileRows | None = None,
    within: Within | None = None,
) -> tuple[int, Kept]:
    """Send `rows` rows from `source` to `target` by way of `function`, which does `job`: how many went, and what they kept."""
    within = within or Within(0, rows, used.number("rows"))
    height, stream = within.together, RowStream()
    stream.low, stream.high = within.low, within.high
    row_bytes = max(source.row_bytes, 0 if target is None else target.row_bytes, 1)
    each = min(max(1, _THROUGH // row_bytes // height), -(-rows // height)) * height
    weight = torch.empty(each * source.columns, dtype=source.dtype, device="cpu")
    job.all.weight = address(weight, source.dtype)
    if target is not None:
        out = torch.empty(each * source.columns, dtype=target.dtype, device="cpu")
        job.all.out = address(out, target.dtype)
        stream.to, stream.to_at, stream.to_row = target.fd, target.start, target.row_bytes
        stream.found = None if target.found is None else address(target.found, torch.uint8)
    stream.function = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
    stream.job, stream.rows, stream.each = ctypes.addressof(job), rows, each  # type: ignore[arg-type]
    setattr(stream, "from", source.fd)
    stream.from_at, stream.from_row = source.start, source.row_bytes
    if used.row_stream is not None:
        used.row_stream(ctypes.byref(stream))
    return int(stream.done), Kept(stream.dot, stream.square)

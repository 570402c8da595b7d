"""Rescaling in compiled code, in memory and from file to file: how stages are handed to it.

Wherever it does not apply, these functions say so, and rescale.py does the same with torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...arithmetic import one_thread, subnormal_numbers
from ..stages import Stage
from ..stats import Kept
from .loader import CODES, Build, Function, RescaleStage, RescaleStream, Rescaling, build
from .parallel import run_parallel
from .pointers import address, is_memory
from .stream import FileRows

_ALONE = 1 << 16
"""Elements that are not worth another thread."""

_THROUGH = 256 * 1024
"""Bytes of rows at once, at least a strip of them."""

_WIDEST = 1 << 18
"""Columns of which a strip in float64 is worth the memory."""


@dataclass(frozen=True, eq=False)
class _PackedStage:
    """A stage's factors as `struct stage` has them."""

    packed_B: Tensor
    packed_A: Tensor
    of_columns: Tensor | None

    @classmethod
    def of(cls, stage: Stage, used: Build) -> _PackedStage:
        """Those of `stage` for `used`; made once."""

        def make() -> _PackedStage:
            factors, width = stage.factors, used.width(torch.float64)
            narrow = torch.float64 not in (factors.given_A.dtype, factors.given_B.dtype)
            with torch.no_grad(), subnormal_numbers(), one_thread():
                ones = torch.ones(factors.r, dtype=torch.float64, device="cpu")
                packed_B = used.ready(factors.given_B, ones, ones, used.number("rows"), torch.float64).packed
                wide = torch.float32 if narrow else torch.float64
                packed_A = used.ready(factors.given_A.T, ones, ones, width, wide).packed
                of_columns = None if stage.rescale is None else stage.rescale.of_columns
                if of_columns is not None:
                    of_columns = pad(of_columns, (0, -of_columns.shape[0] % width))
            return _PackedStage(packed_B, packed_A, of_columns)

        return stage.factors.once(("rescaled", used.name), make)

    def into(self, struct: RescaleStage, stage: Stage) -> None:
        """Tell `struct`."""
        float64, rescale = torch.float64, stage.rescale
        struct.packed_B, struct.packed_A = address(self.packed_B, float64), address(self.packed_A, self.packed_A.dtype)
        struct.r, struct.narrow = stage.update.r, self.packed_A.dtype == torch.float32
        struct.scaling, struct.strength = stage.update.scaling, 1.0
        if self.of_columns is not None:
            struct.factors = address(self.of_columns, float64)
        elif rescale is not None:
            struct.magnitude = address(rescale.magnitude, float64)
        if rescale is not None:
            struct.strength, struct.eps, struct.keep = rescale.strength, rescale.eps, rescale.keep
            struct.from_sum = rescale.rule == "lycoris"


class _Work:
    """What jobs on some matrix have in common, and what must stay in memory while they are done."""

    def __init__(self, used: Build, stages: Sequence[Stage], columns: int) -> None:
        self._used, self._columns = used, columns
        self._packed = [_PackedStage.of(stage, used) for stage in stages]
        self._structs = (RescaleStage * len(stages))()
        for packed, struct, stage in zip(self._packed, self._structs, stages, strict=True):
            packed.into(struct, stage)
        self._rooms: list[Tensor] = []

    def begin(self, job: Rescaling, source: torch.dtype, target: torch.dtype | None, row: int) -> None:
        """Make `job` one of these dtypes, for the rows from `row` on; where they lie is still to be said."""
        width = self._used.width(torch.float64)
        whole = -(-self._columns // width) * width
        self._rooms.append(torch.zeros(3 * self._used.number("rows") * whole, dtype=torch.float64, device="cpu"))
        job.stages, job.count, job.row, job.columns = ctypes.addressof(self._structs), len(self._structs), row, self._columns
        job.weight_dtype = CODES[source]
        job.out_dtype = CODES[target or torch.float64]
        job.weight_stride = job.out_stride = self._columns
        job.room = address(self._rooms[-1], torch.float64)

    def squares(self, squares: Tensor) -> Tensor:
        """`squares`, (columns,), with zeros up to a whole block."""
        return pad(squares, (0, -self._columns % self._used.width(torch.float64)))


def rescale_native(matrix: Tensor, out: Tensor, stages: Sequence[Stage], first: int) -> Kept | None:
    """Fill `out` with what `stages` make of `matrix`, rounded to nearest; None, and nothing in it, where that takes torch.

    - `matrix`, `out`: (rows, columns), the rows from `first` on of what the stages are of

    As many threads work as torch would use.
    """
    used = build()
    if used is None or not _fits(used, stages, first, matrix.shape[1]) or not (_addressable(matrix) and _addressable(out)):
        return None
    height, (rows, columns) = used.number("rows"), matrix.shape
    work = _Work(used, stages, columns)
    each = max(height, -(-max(_ALONE // columns, -(-rows // torch.get_num_threads())) // height) * height)
    starts = range(0, rows, each)
    jobs = (Rescaling * len(starts))()
    for job, start in zip(jobs, starts, strict=True):
        work.begin(job, matrix.dtype, out.dtype, first + start)
        job.weight, job.out = address(matrix, matrix.dtype, start), address(out, out.dtype, start)
        job.weight_stride, job.out_stride, job.rows = matrix.stride(0), out.stride(0), min(each, rows - start)
    if jobs:
        run_parallel(used, used.rescale, jobs)
    kept = sum((Kept(job.dot, job.square) for job in jobs), Kept())
    return kept if math.isfinite(kept.dot + kept.square) else None  # what NaN is written as is torch's affair


def add_squares_native(squares: Tensor, matrix: Tensor, stage: Stage, first: int) -> bool:
    """Add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    Whether that was done; where not, it takes torch.
    """
    used = build()
    if used is None or not _fits(used, [stage], first, matrix.shape[1]) or not _addressable(matrix):
        return False
    work, job = _Work(used, [stage], matrix.shape[1]), Rescaling()
    work.begin(job, matrix.dtype, None, first)
    sums = work.squares(squares)
    job.weight, job.weight_stride, job.rows = address(matrix, matrix.dtype), matrix.stride(0), matrix.shape[0]
    job.column_squares = address(sums, torch.float64)
    used.rescale(ctypes.byref(job))
    squares.copy_(sums[: squares.shape[0]])
    return True


def rescale_between(source: FileRows, rows: int, target: FileRows, stages: Sequence[Stage], first: int) -> tuple[int, Kept]:
    """Read `rows` rows of W from `source`, and write what `stages` make of them to `target`, with the bits of `rescale_rows`.

    - `first`: the row of what the stages are of that is the first of them

    How many rows went through, from the first on, and what was kept in them; as `merge_between` has it.
    """
    used, found = build(), target.found
    function = None if used is None else used.rescale_stream
    if used is None or function is None or not _fits(used, stages, first, source.columns):
        return 0, Kept()
    if not rows or source.dtype not in CODES or target.dtype not in CODES:
        return 0, Kept()
    if found is not None and found.numel() < rows * target.row_bytes:
        return 0, Kept()
    work, job = _Work(used, stages, source.columns), Rescaling()
    each = _each_time(used, rows, max(source.row_bytes, target.row_bytes))
    out = torch.empty(each * source.columns, dtype=target.dtype, device="cpu")
    work.begin(job, source.dtype, target.dtype, first)
    job.out = address(out, target.dtype)
    stream = RescaleStream(to=target.fd, to_at=target.start, to_row=target.row_bytes)
    stream.found = None if found is None else address(found, torch.uint8)
    _through(function, source, rows, each, job, stream)
    return stream.done, Kept(stream.dot, stream.square)


def add_squares_between(squares: Tensor, source: FileRows, rows: int, stage: Stage, first: int) -> int:
    """Read `rows` rows of W from `source`, and add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    Of how many rows that was done, from the first on.
    """
    used = build()
    function = None if used is None else used.rescale_stream
    if used is None or function is None or not _fits(used, [stage], first, source.columns):
        return 0
    if not rows or source.dtype not in CODES:
        return 0
    work, job = _Work(used, [stage], source.columns), Rescaling()
    work.begin(job, source.dtype, None, first)
    sums, stream = work.squares(squares), RescaleStream()
    job.column_squares = address(sums, torch.float64)
    _through(function, source, rows, _each_time(used, rows, source.row_bytes), job, stream)
    squares.copy_(sums[: squares.shape[0]])
    return int(stream.done)


def _through(function: Function, source: FileRows, rows: int, each: int, job: Rescaling, stream: RescaleStream) -> None:
    weight = torch.empty(each * source.columns, dtype=source.dtype, device="cpu")
    job.weight = address(weight, source.dtype)
    stream.job, stream.rows, stream.each = ctypes.addressof(job), rows, each
    setattr(stream, "from", source.fd)
    stream.from_at, stream.from_row = source.start, source.row_bytes
    function(ctypes.byref(stream))


def _each_time(used: Build, rows: int, row_bytes: int) -> int:
    """Rows at once."""
    height = used.number("rows")
    return min(max(1, _THROUGH // max(1, row_bytes) // height), -(-rows // height)) * height


def _fits(used: Build, stages: Sequence[Stage], first: int, columns: int) -> bool:
    """Whether `used` does stages on the rows from `first` on."""
    on_cpu = all(is_memory(factor) for stage in stages for factor in (stage.update.lora_A, stage.update.lora_B))
    return on_cpu and first % used.number("rows") == 0 and 0 < columns <= _WIDEST


def _addressable(matrix: Tensor) -> bool:
    """Whether its numbers lie in memory as compiled code takes them."""
    return is_memory(matrix) and matrix.dtype in CODES and matrix.stride(1) == 1

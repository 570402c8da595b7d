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
from ..rounding import Stochastic
from ..stages import Rescale, Stage
from ..stats import Kept
from .loader import Build, RescaleStage, Rescaling, build
from .parallel import run_parallel
from .pointers import address, is_memory
from .rowwise import Manner, addressable, in_memory, streams, through
from .stream import FileRows

_ALONE = 1 << 16
"""Elements that are not worth another thread."""

_WIDEST = 1 << 18
"""Columns of which a strip in float64 is worth the memory."""


@dataclass(frozen=True, eq=False)
class _PackedStage:
    """A stage's factors as `struct stage` has them."""

    packed_B: Tensor | None
    packed_A: Tensor
    of_rows: Tensor | None
    of_columns: Tensor | None
    inner: Tensor | None

    @classmethod
    def of(cls, stage: Stage, used: Build) -> _PackedStage:
        """Those of `stage` for `used`; made once."""

        def make() -> _PackedStage:
            factors, width = stage.factors, used.width(torch.float64)
            narrow = stage.inner is None and torch.float64 not in (factors.given_A.dtype, factors.given_B.dtype)
            with torch.no_grad(), subnormal_numbers(), one_thread():
                ones = torch.ones(factors.r, dtype=torch.float64, device="cpu")
                packed_B = None
                if stage.inner is None:
                    packed_B = used.ready(factors.given_B, ones, ones, used.number("rows"), torch.float64).packed
                wide = torch.float32 if narrow else torch.float64
                packed_A = used.ready(factors.given_A.T, ones, ones, width, wide).packed
                of_columns = None if stage.rescale is None else stage.rescale.of_columns
                if of_columns is not None:
                    of_columns = pad(of_columns, (0, -of_columns.shape[0] % width))
                inner = stage.inner
                if inner is not None:
                    inner = pad(inner.double(), (0, -inner.shape[1] % width)).contiguous()
                of_rows = None if stage.rescale is None else stage.rescale.of_rows
            return _PackedStage(packed_B, packed_A, of_rows, of_columns, inner)

        return stage.factors.once(("rescaled", used.name), make)

    def into(self, struct: RescaleStage, stage: Stage, source: torch.dtype) -> None:
        """Tell `struct`, of a matrix of `source`."""
        float64, rescale = torch.float64, stage.rescale
        struct.packed_A = address(self.packed_A, self.packed_A.dtype)
        struct.packed_B = None if self.packed_B is None else address(self.packed_B, float64)
        struct.r, struct.narrow = stage.update.r, self.packed_A.dtype == torch.float32
        struct.scaling, struct.strength = stage.update.scaling, 1.0
        if self.inner is not None:
            struct.inner = address(self.inner, float64)
            struct.unrounded = stage.inner is not None and torch.float64 not in (stage.inner.dtype, source)
        if self.of_columns is not None:
            struct.factors = address(self.of_columns, float64)
        elif self.of_rows is not None:
            struct.row_factors = address(self.of_rows, float64)
        elif isinstance(rescale, Rescale):
            struct.magnitude = address(rescale.magnitude, float64)
        if isinstance(rescale, Rescale):
            struct.strength, struct.eps, struct.keep = rescale.strength, rescale.eps, rescale.keep
            struct.from_sum = rescale.rule == "lycoris"


class _Work:
    """What jobs on some matrix have in common, and what must stay in memory while they are done."""

    def __init__(self, used: Build, stages: Sequence[Stage], source: torch.dtype, columns: int) -> None:
        self._used, self._source, self._columns = used, source, columns
        self._packed = [_PackedStage.of(stage, used) for stage in stages]
        self._structs = (RescaleStage * len(stages))()
        self._r = max(stage.update.r for stage in stages)
        for packed, struct, stage in zip(self._packed, self._structs, stages, strict=True):
            packed.into(struct, stage, source)
        self._rooms: list[Tensor] = []

    def begin(self, job: Rescaling, manner: Manner) -> None:
        """Make `job` one for rows as `manner` has them; where they lie is still to be said."""
        width = self._used.width(torch.float64)
        whole, r = (-(-count // width) * width for count in (self._columns, self._r))
        self._rooms.append(torch.zeros((3 * whole + r) * self._used.number("rows"), dtype=torch.float64, device="cpu"))
        manner.into(job.all, self._source, self._columns)
        job.stages, job.count = ctypes.addressof(self._structs), len(self._structs)
        job.room = address(self._rooms[-1], torch.float64)

    def squares(self, squares: Tensor) -> Tensor:
        """`squares`, (columns,), with zeros up to a whole block."""
        return pad(squares, (0, -self._columns % self._used.width(torch.float64)))


def rescale_native(
    matrix: Tensor, out: Tensor, stages: Sequence[Stage], first: int, noise: Stochastic | None = None
) -> Kept | None:
    """Fill `out` with what `stages` make of `matrix`, rounded; None, and nothing in it, where that takes torch.

    - `matrix`, `out`: (rows, columns), the rows from `first` on of what the stages are of
    - `noise`: what decides how they are rounded; None, and they are rounded to nearest

    As many threads work as torch would use.
    """
    used = build()
    if used is None or not _fits(used, stages, first, matrix) or not addressable(matrix) or not addressable(out):
        return None
    height, (rows, columns) = used.number("rows"), matrix.shape
    work = _Work(used, stages, matrix.dtype, columns)
    each = max(height, -(-max(_ALONE // columns, -(-rows // torch.get_num_threads())) // height) * height)
    starts = range(0, rows, each)
    jobs = (Rescaling * len(starts))()
    for job, start in zip(jobs, starts, strict=True):
        work.begin(job, Manner(first, out.dtype, noise))
        in_memory(job.all, matrix, out, start, min(each, rows - start))
    if jobs:
        run_parallel(used, used.rescale, jobs)
    kept = sum((Kept(job.all.dot, job.all.square) for job in jobs), Kept())
    return kept if math.isfinite(kept.dot + kept.square) else None  # what NaN is written as is torch's affair


def add_squares_native(squares: Tensor, matrix: Tensor, stage: Stage, first: int) -> bool:
    """Add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    Whether that was done; where not, it takes torch.
    """
    used = build()
    if used is None or not _fits(used, [stage], first, matrix) or not addressable(matrix):
        return False
    work, job = _Work(used, [stage], matrix.dtype, matrix.shape[1]), Rescaling()
    work.begin(job, Manner(first, None))
    sums = work.squares(squares)
    job.all.weight, job.all.weight_stride, job.all.rows = address(matrix, matrix.dtype), matrix.stride(0), matrix.shape[0]
    job.column_squares = address(sums, torch.float64)
    used.rescale(ctypes.byref(job))
    squares.copy_(sums[: squares.shape[0]])
    return True


def rescale_between(
    source: FileRows, rows: int, target: FileRows, stages: Sequence[Stage], first: int, noise: Stochastic | None = None
) -> tuple[int, Kept]:
    """Read `rows` rows of W from `source`, and write what `stages` make of them to `target`, with the bits of `rescale_rows`.

    - `first`: the row of what the stages are of that is the first of them; `noise`: as `rescale_native` has it

    How many rows went through, from the first on, and what was kept in them; as `merge_between` has it.
    """
    used = build()
    if used is None or not streams(used, source, rows, target) or not _fits(used, stages, first, source):
        return 0, Kept()
    work, job = _Work(used, stages, source.dtype, source.columns), Rescaling()
    work.begin(job, Manner(first, target.dtype, noise))
    return through(used, used.rescale, job, source, rows, target)


def add_squares_between(squares: Tensor, source: FileRows, rows: int, stage: Stage, first: int) -> int:
    """Read `rows` rows of W from `source`, and add the squares of W + ΔW to `squares`, (columns,) float64, row after row.

    Of how many rows that was done, from the first on.
    """
    used = build()
    if used is None or not streams(used, source, rows, None) or not _fits(used, [stage], first, source):
        return 0
    work, job = _Work(used, [stage], source.dtype, source.columns), Rescaling()
    work.begin(job, Manner(first, None))
    sums = work.squares(squares)
    job.column_squares = address(sums, torch.float64)
    done, _ = through(used, used.rescale, job, source, rows)
    squares.copy_(sums[: squares.shape[0]])
    return done


def _fits(used: Build, stages: Sequence[Stage], first: int, weight: Tensor | FileRows) -> bool:
    """Whether `used` does stages on the rows of `weight`, those from `first` on."""
    columns = weight.shape[1] if isinstance(weight, Tensor) else weight.columns
    if not 0 < columns <= _WIDEST or first % used.number("rows") != 0:
        return False
    return all(is_memory(factor) for stage in stages for factor in (stage.update.lora_A, stage.update.lora_B))

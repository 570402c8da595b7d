"""The factors of a merge as the compiled kernel reads them: in blocks, and for `exact` with the bounds of its sums."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .compiled import Build, Job, Ready
from .exact import SLACK, UNIT, error_bound
from .factors import Factors
from .rounding import HALVES


@dataclass(frozen=True, eq=False)
class Packed:
    """Factors in blocks of rows and columns; `struct job` of native.c says how they lie."""

    packed_B: Tensor
    packed_A: Tensor
    r: int

    def into(self, job: Job, row: int) -> None:
        """Tell `job`, which begins with the row `row` of ΔW, the first of a block."""
        job.r = self.r
        job.packed_A = self.packed_A.data_ptr()
        job.packed_B = self.packed_B.data_ptr() + row * self.r * self.packed_B.element_size()


@dataclass(frozen=True, eq=False)
class Bounded(Packed):
    """And what `exact` needs of them besides; the fields are those of the job."""

    row_errors: Tensor
    column_errors: Tensor
    largest_column_error: float
    scaled_B: Tensor
    share: float

    def into(self, job: Job, row: int) -> None:
        """Tell `job`, which begins with the row `row` of ΔW, the first of a block."""
        super().into(job, row)
        job.row_errors = self.row_errors.data_ptr() + row * self.row_errors.element_size()
        job.column_errors = self.column_errors.data_ptr()
        job.largest_column_error = self.largest_column_error
        job.scaled_B = self.scaled_B.data_ptr() + row * self.r * self.scaled_B.element_size()
        job.unit = 3 * UNIT[torch.float64] * SLACK  # adding the weight is rounded, and so is each end
        job.share = self.share


def packed(factors: Factors, used: Build) -> Packed:
    """`factors` in the blocks of the build `used` for sums in float32; made once."""

    def make() -> Packed:
        side_B, side_A = _sides(factors, used, torch.float32, factors.scaling)  # norms that nobody asks for
        return Packed(side_B.packed, side_A.packed, factors.r)

    return factors.once(("packed", used.name), make)


def bounded(factors: Factors, used: Build, wide: torch.dtype) -> Bounded | None:
    """The same for sums in `wide`, and their bounds as `used` sums; None where numbers on the way might overflow. Made once."""

    def make() -> Bounded | None:
        roundings = _roundings(factors, wide, used.number("span"))
        side_B, side_A = _sides(factors, used, wide, roundings, keep=True)
        bound = error_bound(factors, wide, (side_B.norms, side_A.norms))
        if not bound.safe:
            return None
        return Bounded(
            packed_B=side_B.packed,
            packed_A=side_A.packed,
            r=factors.r,
            row_errors=_whole(bound.rows, used.number("rows")),
            column_errors=_whole(bound.columns, used.width(wide)),
            largest_column_error=float(bound.columns.max()),
            scaled_B=side_B.scaled,
            share=(factors.r + 6) * UNIT[torch.float64] / (float(roundings.min()) * UNIT[wide]),
        )

    return factors.once(("bounded", used.name, wide), make)


def _sides(factors: Factors, used: Build, wide: torch.dtype, weights: Tensor, *, keep: bool = False) -> tuple[Ready, Ready]:
    """B, scaled, and A; `weights` are those of the norms."""
    return (
        used.ready(factors.given_B, factors.scaling, weights, used.number("rows"), wide, keep=keep),
        used.ready(factors.given_A.T, torch.ones_like(factors.scaling), weights, used.width(wide), wide),
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


def _whole(matrix: Tensor, size: int) -> Tensor:
    """`matrix` with zeros up to a multiple of `size` in its last dimension."""
    missing = -matrix.shape[-1] % size
    return pad(matrix, (0, missing)) if missing else matrix

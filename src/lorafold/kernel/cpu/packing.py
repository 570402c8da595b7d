"""The factors of a merge as the compiled kernel reads them: in blocks, and for `exact` with the bounds of its sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errorfree import two_product
from ..exact import SLACK, UNIT, error_bound
from ..factors import Factors
from ..rounding import HALVES
from .loader import CODES, Build, Function, How, MergeJob, PackedSide
from .pointers import address

_HIGH_RANK = {torch.bfloat16: 256, torch.float16: 128}
"""Below this rank sums in float32 leave so few elements of this dtype undecided that they are faster than sums in float64."""


@dataclass(frozen=True, eq=False)
class PackedFactors:
    """Factors in blocks of rows and columns; `struct job` of merge.c says how they lie."""

    packed_B: Tensor
    packed_A: Tensor
    r: int

    def into(self, job: MergeJob, row: int) -> None:
        """Tell `job`, which begins with the row `row` of ΔW, the first of a block."""
        job.r = self.r
        wide = self.packed_A.dtype
        job.packed_A = address(self.packed_A, wide)
        job.packed_B = address(self.packed_B, wide, row // self.packed_B.shape[2])


@dataclass(frozen=True, eq=False)
class BoundedFactors(PackedFactors):
    """And what `exact` needs of them besides; the fields are those of the job."""

    row_errors: Tensor
    column_errors: Tensor
    largest_column_error: float
    scaled_B: Tensor
    given_B: Tensor
    scaling: Tensor
    share: float
    packed_rest: Tensor | None = None

    def into(self, job: MergeJob, row: int) -> None:
        """Tell `job`, which begins with the row `row` of ΔW, the first of a block."""
        super().into(job, row)
        job.row_errors = address(self.row_errors, self.packed_A.dtype, row)
        job.column_errors = address(self.column_errors, self.packed_A.dtype)
        job.largest_column_error = self.largest_column_error
        job.scaled_B = address(self.scaled_B, torch.float64, row)
        job.given_B, job.B_dtype = address(self.given_B, self.given_B.dtype), CODES[self.given_B.dtype]
        (job.B_row_stride, job.B_stride), job.B_row = self.given_B.stride(), row
        job.scaling = address(self.scaling, torch.float64)
        job.unit = 3 * UNIT[torch.float64] * SLACK  # adding the weight is rounded, and so is each end
        job.share = self.share
        if self.packed_rest is not None:
            job.packed_rest = address(self.packed_rest, torch.float64, row // self.packed_rest.shape[2])


@dataclass(frozen=True, eq=False)
class Prepared:
    """What does a job, the factors as it reads them, and the dtype that these are in."""

    function: Function
    blocks: PackedFactors
    wide: torch.dtype


def prepare(
    used: Build,
    weight: torch.dtype,
    out: torch.dtype,
    factors: Factors,
    precision: Literal["fast", "exact"],
    *,
    stochastic: bool,
) -> Prepared | None:
    """How jobs of these dtypes are done by `used`; None where that takes torch. The factors are made ready once."""
    exact = precision == "exact"
    of_float64 = torch.float64 in (weight, out)
    wide = torch.float64 if of_float64 else _wide_dtype(out, factors) if exact else torch.float32
    hows: tuple[How, How] = ("float", "double") if exact else ("fast", "fast_double")
    how = hows[wide == torch.float64]
    function = used.function(weight, out, how, stochastic=stochastic)
    if function is None:
        return None
    blocks: PackedFactors | None
    if not exact:
        blocks = packed(factors, used, wide)
    else:
        blocks = unrounded(factors, used) if out == torch.float64 else bounded(factors, used, wide)
    return None if blocks is None else Prepared(function, blocks, wide)


def in_blocks(factors: Factors, first: int, rows: int, height: int) -> bool:
    """Whether `rows` rows from `first` on are whole blocks of `height` rows of `factors`, as they are packed."""
    return first % height == 0 and (rows % height == 0 or first + rows == factors.shape[0])


def packed(factors: Factors, used: Build, wide: torch.dtype) -> PackedFactors:
    """`factors` in the blocks of the build `used` for sums in `wide`; made once."""

    def make() -> PackedFactors:
        side_B, side_A = _sides(factors, used, wide, factors.scaling)  # norms that nobody asks for
        return PackedFactors(side_B.packed, side_A.packed, factors.r)

    return factors.once(("packed", used.name, wide), make)


def bounded(factors: Factors, used: Build, wide: torch.dtype) -> BoundedFactors | None:
    """The same for sums in `wide`, and their bounds as `used` sums; None where numbers on the way might overflow. Made once."""

    def make() -> BoundedFactors | None:
        roundings = _roundings(factors, wide, used.number("span"))
        side_B, side_A = _sides(factors, used, wide, roundings, keep=True)
        bound = error_bound(factors, wide, (side_B.norms, side_A.norms))
        if not bound.safe:
            return None
        return BoundedFactors(
            packed_B=side_B.packed,
            packed_A=side_A.packed,
            r=factors.r,
            row_errors=_whole(bound.rows, used.number("rows")),
            column_errors=_whole(bound.columns, used.width(wide)),
            largest_column_error=float(bound.columns.max()),
            scaled_B=side_B.scaled,
            given_B=side_B.given,
            scaling=factors.scaling,
            share=(factors.r + 6) * UNIT[torch.float64] / (float(roundings.min()) * UNIT[wide]),
        )

    return factors.once(("bounded", used.name, wide), make)


def unrounded(factors: Factors, used: Build) -> BoundedFactors | None:
    """The same for results in float64, with the bound of sums of two float64 (float64.h); None as of `bounded`. Made once."""

    def make() -> BoundedFactors | None:
        found = bounded(factors, used, torch.float64)
        if found is None:
            return None
        rest = two_product(factors.given_B.double(), factors.scaling)[1]  # what `scaled_B` lacks
        if not rest.isfinite().all():
            return None
        height = used.number("rows")
        blocks = _whole(rest.T, height).view(factors.r, -1, height).transpose(0, 1).contiguous() if rest.any() else None
        return replace(found, share=found.share * (factors.r + 6) * UNIT[torch.float64], packed_rest=blocks)

    return factors.once(("unrounded", used.name), make)


def _wide_dtype(target: torch.dtype, factors: Factors) -> torch.dtype:
    """The dtype that the sums of `exact` are kept in: one that holds A as it is."""
    return torch.float32 if factors.r < _HIGH_RANK.get(target, 0) and is_narrow(factors) else torch.float64


def is_narrow(factors: Factors) -> bool:
    """Whether float32 holds A as it is."""
    return factors.once("A in float32", lambda: _is_narrow(factors.given_A))


def _is_narrow(matrix: Tensor) -> bool:
    """Whether float32 holds every number of `matrix` as it is."""
    return matrix.dtype in (*HALVES, torch.float32) or torch.equal(matrix.float().double(), matrix.double())


def _sides(
    factors: Factors, used: Build, wide: torch.dtype, weights: Tensor, *, keep: bool = False
) -> tuple[PackedSide, PackedSide]:
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

"""Updates that are products element by element in compiled code, in memory and from file to file: how they are handed to it.

Wherever it does not apply, these functions say so, and elementsums.py does the same with torch, in `exact` with the same bits.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...arithmetic import one_thread, subnormal_numbers
from ..elementwise import ElementwiseSum, Multiplicand
from ..rounding import Stochastic
from ..stats import Kept
from .loader import CODES, Build, Products, ProductSide, ProductTerm, build
from .parallel import run_parallel
from .pointers import address, is_memory
from .rowwise import Manner, addressable, in_memory, streams, through
from .stream import FileRows

_ALONE = 1 << 14
"""Elements that are not worth another thread."""

_PANEL = 512
"""Columns at once, as in elementwise.h."""

_WIDEST = 1 << 24
"""Columns."""


@dataclass(frozen=True, eq=False)
class _PackedProduct:
    """P or Q as `struct product_side` has it.

    - `matrix`: B, or the matrix itself, in one of the dtypes of `CODES`; `packed_A`: None where it is the matrix itself
    """

    matrix: Tensor
    packed_A: Tensor | None
    r: int
    columns: int

    @classmethod
    def of(cls, side: Multiplicand, used: Build) -> _PackedProduct:
        """That of `side` for `used`."""
        if side.lora_B is None:
            return cls(_plain(side.lora_A), None, 0, side.shape[1])
        wide = torch.float64 if side.lora_A.dtype == torch.float64 else torch.float32
        ones = torch.ones(side.r, dtype=torch.float64, device="cpu")
        packed = used.ready(side.lora_A.T, ones, ones, used.width(torch.float64), wide).packed
        return cls(_plain(side.lora_B), packed, side.r, side.shape[1])

    def into(self, struct: ProductSide) -> None:
        """Tell `struct`."""
        struct.matrix, struct.dtype = address(self.matrix, self.matrix.dtype), CODES[self.matrix.dtype]
        struct.row_stride, struct.stride = self.matrix.stride()
        struct.r, struct.rows, struct.columns = self.r, self.matrix.shape[0], self.columns
        if self.packed_A is not None:
            struct.packed_A = address(self.packed_A, self.packed_A.dtype)
            struct.narrow = self.packed_A.dtype == torch.float32

    def room(self, *, kronecker: bool, width: int) -> int:
        """Numbers for a row of a strip."""
        return -(-self.columns // width) * width if kronecker else self.r


def _plain(matrix: Tensor) -> Tensor:
    return (matrix if matrix.dtype in CODES else matrix.double()).resolve_neg()


class _Packed:
    """A sum as jobs read it."""

    def __init__(self, total: ElementwiseSum, used: Build) -> None:
        height, width = used.number("rows"), used.width(torch.float64)
        bound = total.bound
        self.rows, self.columns = bound.rows, pad(bound.columns, (0, -bound.columns.shape[0] % width))
        self.terms = (ProductTerm * len(total.updates))()
        self.held: list[_PackedProduct] = []
        self.room, self.width = height * _PANEL, total.shape[1]
        for struct, update in zip(self.terms, total.updates, strict=True):
            struct.kronecker, struct.scaling = update.kronecker, update.scaling
            for place, side in zip((struct.one, struct.other), update.sides, strict=False):
                packed = _PackedProduct.of(side, used)
                packed.into(place)
                self.held.append(packed)
                self.room += height * packed.room(kronecker=update.kronecker, width=width)

    @classmethod
    def of(cls, total: ElementwiseSum, used: Build) -> _Packed:
        """That of `total` for `used`; made once."""
        with torch.no_grad(), subnormal_numbers(), one_thread():
            return total.once(("packed", used.name), lambda: cls(total, used))

    def job(self, job: Products, manner: Manner, source: torch.dtype, precision: Literal["fast", "exact"]) -> Tensor:
        """Make `job` one for rows of `source` as `manner` has them; the room that must stay while it is done."""
        room = torch.zeros(self.room, dtype=torch.float64, device="cpu")
        manner.into(job.all, source, self.width)
        job.terms, job.count, job.room = ctypes.addressof(self.terms), len(self.terms), address(room, torch.float64)
        if precision == "exact":
            job.row_errors, job.column_errors = address(self.rows, torch.float64), address(self.columns, torch.float64)
            job.largest_column_error = float(self.columns.max())
        return room


def multiply_native(
    matrix: Tensor, out: Tensor, total: ElementwiseSum, first: int, precision: Literal["fast", "exact"], noise: Stochastic | None
) -> Kept | None:
    """Fill `out` with round(W + ΔW), as `merge_elementwise` does; None, and nothing in it, where that takes torch.

    As many threads work as torch would use.
    """
    used = build()
    if used is None or not _fits(total, matrix.dtype, out.dtype) or not addressable(matrix) or not addressable(out):
        return None
    (rows, columns), height = matrix.shape, used.number("rows")
    packed = _Packed.of(total, used)
    each = max(height, -(-max(_ALONE // columns, -(-rows // torch.get_num_threads())) // height) * height)
    starts = range(0, rows, each)
    jobs = (Products * len(starts))()
    rooms = [packed.job(job, Manner(first, out.dtype, noise), matrix.dtype, precision) for job in jobs]
    for job, start in zip(jobs, starts, strict=True):
        in_memory(job.all, matrix, out, start, min(each, rows - start))
    if rooms:
        run_parallel(used, used.products, jobs)
    kept = sum((Kept(job.all.dot, job.all.square) for job in jobs), Kept())
    whole = math.isfinite(kept.dot + kept.square) and not any(job.all.undecided for job in jobs)
    return kept if whole else None


def multiply_between(
    source: FileRows,
    rows: int,
    target: FileRows,
    total: ElementwiseSum,
    first: int,
    precision: Literal["fast", "exact"],
    noise: Stochastic | None,
) -> tuple[int, Kept]:
    """Read `rows` rows of W from `source`, and write round(W + ΔW) to `target`, with the bits of `merge_elementwise`.

    How many rows went through, from the first on, and what was kept in them; as `merge_between` has it.
    """
    used = build()
    if used is None or not streams(used, source, rows, target) or not _fits(total, source.dtype, target.dtype):
        return 0, Kept()
    packed, job = _Packed.of(total, used), Products()
    room = packed.job(job, Manner(first, target.dtype, noise), source.dtype, precision)
    found = through(used, used.products, job, source, rows, target)
    del room
    return found


def _fits(total: ElementwiseSum, source: torch.dtype, target: torch.dtype) -> bool:
    """Whether compiled code adds `total` to a matrix of `source`, and rounds to `target`."""
    if source not in CODES or target == torch.float64 or not 0 < total.shape[1] <= _WIDEST or not total.bound.safe:
        return False
    sides = [side for update in total.updates for side in update.sides]
    return all(is_memory(each) for side in sides for each in (side.lora_A, side.lora_B) if each is not None)

"""A tensor in blocks of rows, and what each block must hold. Writing and proving both start from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import NonFiniteError, memory_shortage, printable
from ..files.safetensors.buffers import tensor_over
from ..files.safetensors.info import BITS, TORCH_DTYPES
from ..kernel.elementsums import merge_elementwise
from ..kernel.merge import merge_rows
from ..kernel.rescale import rescale_rows
from ..kernel.rounding import Rounding, Stochastic, noise_of
from ..kernel.stats import Kept
from ..options import SumOptions
from ..planning.plan import Step, nbytes
from .change import Change

BLOCK_BYTES = 8 * 1024 * 1024
"""Bytes of a block as it is written. A handful of blocks is all the memory that a merge takes, whatever the tensor's size."""

_TOGETHER = 8
"""Rows that the compiled kernel does together; blocks that begin with such rows need nothing packed anew."""


@dataclass(frozen=True)
class Block:
    """Rows `start` to `start + count` of a step's tensor, seen as a matrix of `columns`."""

    step: Step
    start: int
    count: int
    columns: int

    @property
    def offset(self) -> int:
        """Elements of the tensor before the block."""
        return self.start * self.columns

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return self.count * self.columns

    def after(self, rows: int) -> Block:
        """The block without its first `rows`."""
        return replace(self, start=self.start + rows, count=self.count - rows)


def matrix_shape(step: Step) -> tuple[int, int]:
    """(rows, columns) of the step's tensor as the matrix that updates are added to.

    A row is what belongs to one index of the first dimension, and one number of a vector; of a stack of matrices with updates of
    their own, a row of one of them.
    """
    shape = step.numbers
    if len(shape) > 1 and any(addend.rows is not None for addend in step.addends):
        return math.prod(shape[:-1]), shape[-1]
    return (shape[0] if shape else 1), math.prod(shape[1:])


def blocks_of(step: Step) -> Iterator[Block]:
    """The blocks of a tensor, in order. How it is cut depends on the step alone, so that it is the same on every machine."""
    return _cut(step, _rows_in_memory(step))


def passes_of(step: Step) -> Iterator[Block]:
    """The same, but of a quantised tensor as many rows as go through compiled code at once, several of its blocks."""
    return _cut(step, _rows_of(step, _width(step)))


def head_of(block: Block) -> Block:
    """As many of its first rows as are done in memory at once."""
    return replace(block, count=min(block.count, _rows_in_memory(block.step)))


_WIDTH = 2
"""Bytes of a number in a block at least: of bfloat16, which most weights are."""

_WIDTH_DECODED = 64
"""And of what is decoded in memory, by way of several tensors of float64."""


def _cut(step: Step, each: int) -> Iterator[Block]:
    rows, columns = matrix_shape(step)
    for start in range(0, rows, each):
        yield Block(step, start, min(each, rows - start), columns)


def _rows_in_memory(step: Step) -> int:
    return _rows_of(step, _width(step) if step.coded is None else _WIDTH_DECODED)


def _width(step: Step) -> int:
    """Bytes of a number as it is written, for which there must be room several times."""
    return _WIDTH if step.action == "encode" else max(_WIDTH, BITS[step.dtype] // 8)


def _rows_of(step: Step, width: int) -> int:
    """Rows of a block in which a number has `width` bytes."""
    together = _TOGETHER if step.coded is None else math.lcm(_TOGETHER, step.coded.together)
    each = max(1, BLOCK_BYTES // max(1, matrix_shape(step)[1] * width))
    each -= each % together if each > together else 0
    return each if step.coded is None or step.action != "encode" else max(each, step.coded.together)


def block_bytes(block: Block, dtype: str) -> int:
    """Bytes of the block's rows in `dtype`, safetensors' name; of codes, which are as they are, their bytes."""
    if block.step.action == "encode":
        return _bytes_before(block, block.start + block.count) - _bytes_before(block, block.start)
    return block.numel * BITS[dtype] // 8


def block_offset(block: Block) -> int:
    """Bytes of the step's tensor before the block."""
    if block.step.action == "encode":
        return _bytes_before(block, block.start)
    return block.offset * BITS[block.step.dtype] // 8


def _bytes_before(block: Block, row: int) -> int:
    """Bytes of the codes before those of row `row` of the numbers."""
    rows = matrix_shape(block.step)[0]
    return nbytes(block.step) * row // max(1, rows)


class OfStep(Protocol):
    """What is a part of a step's tensor."""

    @property
    def step(self) -> Step:
        """The step."""


Part = TypeVar("Part", bound=OfStep)
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def naming_the_tensor(work: Callable[Concatenate[Part, Rest], Result]) -> Callable[Concatenate[Part, Rest], Result]:
    """`work`, which is given a part of a step's tensor, raising `MemoryShortageError` with its name where memory runs out."""

    @wraps(work)
    def named(part: Part, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        try:
            return work(part, *args, **kwargs)
        except (MemoryError, RuntimeError) as cause:
            shortage = memory_shortage(cause, f"at tensor '{printable(part.step.tensor)}'")
            if shortage is None:
                raise
            raise shortage from cause

    return named


@naming_the_tensor
def compute(
    block: Block, matrix: Tensor, change: Change, options: SumOptions, buffer: bytearray | memoryview | None = None
) -> tuple[Tensor, Kept]:
    """The block's rows of the output, (count, columns) of the step's dtype, and how much of the update they kept.

    - `matrix`: the same rows of what the step starts from (the base's, or the replacement's), of any floating dtype
    - `change`: the whole tensor's; `buffer`: memory for the result, `block_bytes` or more

    Raises `NonFiniteError` where NaN or infinity goes in or comes out of a sum.
    """
    step = block.step
    dtype = TORCH_DTYPES[step.dtype]
    shape = tuple(matrix.shape)
    out = torch.empty(shape, dtype=dtype, device="cpu") if buffer is None else tensor_over(buffer, dtype, shape)
    if step.action == "copy":  # what is no copy of stored bytes
        return out.copy_(matrix), Kept()
    stop = block.start + block.count
    matrix = change.begin(matrix, block.start)
    kept = Kept()
    if change.whole is not None:
        out.copy_(change.whole().rows[block.start : stop])
        kept = change.whole().kept(block.start, stop)
    elif change.elements is not None:
        kept = merge_elementwise(
            matrix,
            change.elements,
            block.start,
            out=out,
            precision=options.precision,
            noise=noise_of(rounding_of(block.start, block, options), dtype),
        )
    elif change.stages:
        for stages, low, high, first in change.staged(block.start, stop):
            here = slice(low - block.start, high - block.start)
            kept += rescale_rows(matrix[here], stages, first, out=out[here], rounding=rounding_of(low, block, options))
    else:
        for piece, low, high in change.within(block.start, stop):
            here = slice(low - block.start, high - block.start)
            kept += merge_rows(
                matrix[here],
                piece.factors,
                low - piece.start,
                out=out[here],
                precision=options.precision,
                rounding=rounding_of(low, block, options),
            )
    if change.rows is not None:
        rows = change.rows.narrow(block.start, block.count)
        rows.put(out)
        if change.adds and not out[rows.indices].isfinite().all():  # what was kept does not tell of them
            _settle_nonfinite(block, matrix, out, options)
    if change.adds and not math.isfinite(kept.dot + kept.square):  # no number that is not finite hides from the inner products
        clamped = _settle_nonfinite(block, matrix, out, options)
        kept = Kept(clamped=clamped)  # finite numbers, too large for their squares, or not measured for what was let through
    if not change.adds and step.action in ("cast", "replace", "rows") and not out.isfinite().all():
        kept = Kept(clamped=_settle_nonfinite(block, matrix, out, options, merged=False))
    return out, kept


@naming_the_tensor
def sums(block: Block, matrix: Tensor, change: Change, options: SumOptions) -> Tensor:
    """(count, columns) float64: what is made codes of, of a step that encodes: the exact sum; arguments as `compute` has them.

    Raises `NonFiniteError` where NaN or infinity goes in.
    """
    matrix = change.begin(matrix, block.start)
    found = torch.empty(matrix.shape, dtype=torch.float64, device="cpu")
    stop = block.start + block.count
    if change.whole is not None:
        found.copy_(change.whole().rows[block.start : stop])
    elif change.elements is not None:
        merge_elementwise(matrix, change.elements, block.start, out=found, precision="exact")
    elif change.stages:
        for stages, low, high, first in change.staged(block.start, stop):
            here = slice(low - block.start, high - block.start)
            rescale_rows(matrix[here], stages, first, out=found[here])
    else:
        for piece, low, high in change.within(block.start, stop):
            here = slice(low - block.start, high - block.start)
            merge_rows(matrix[here], piece.factors, low - piece.start, out=found[here], precision="exact")
    if not options.allow_nonfinite_base and not found.isfinite().all():
        what = "the base checkpoint is damaged; `allow_nonfinite_base=True` keeps it"
        _refuse(block, matrix, ~matrix.isfinite(), "in the base", what)
    return found


def _settle_nonfinite(block: Block, matrix: Tensor, out: Tensor, options: SumOptions, *, merged: bool = True) -> int:
    """Refuse what is not finite in a block, or mend it as `options` ask; what is only cast may hold what the base holds.

    How many numbers were put to the largest.
    """
    clamped = 0
    if merged and not options.allow_nonfinite_base:
        _refuse(
            block, matrix, ~matrix.isfinite(), "in the base", "the base checkpoint is damaged; `allow_nonfinite_base=True` keeps it"
        )
    if options.on_overflow == "clamp":
        largest = torch.finfo(out.dtype).max
        beyond = out.isinf() & matrix.isfinite()
        clamped = int(beyond.sum())
        out.copy_(torch.where(beyond, out.clamp(-largest, largest), out))
    what = "after merging into" if merged else "after rounding to"
    hint = "a wider `dtype=…` holds larger numbers, `on_overflow='clamp'` puts the largest that this one has"
    _refuse(block, out, ~out.isfinite() & matrix.isfinite(), f"{what} {block.step.dtype}", hint)
    return clamped


def rounding_of(row: int, block: Block, options: SumOptions) -> Rounding:
    """How the rows from `row` of the tensor on are rounded."""
    return "nearest" if options.float_rounding == "nearest" else Stochastic(options.seed, block.step.tensor, row * block.columns)


def _refuse(block: Block, matrix: Tensor, bad: Tensor, where: str, hint: str) -> None:
    if not bad.any():
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    place = block.offset + row * block.columns + column
    shape = block.step.numbers
    index = [place // math.prod(shape[dim + 1 :]) % size for dim, size in enumerate(shape)]
    raise NonFiniteError(
        f"tensor '{printable(block.step.tensor)}' holds {int(bad.sum())} numbers that are not finite {where},"
        f" the first at {index}: {float(matrix[row, column])}",
        hint=f"nothing was written; {hint}",
    )

"""A tensor in blocks of rows, and what each block must hold. Writing and proving both start from here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError, printable
from ..kernel import Kept, Stochastic, merge_measured
from ..planning import MergeOptions, Step
from ..tensorfile import BITS, TORCH_DTYPES, tensor_over
from .change import Change, rescaled

BLOCK_BYTES = 4 * 1024 * 1024
"""Bytes of a block of bfloat16. A handful of blocks is all the memory that a merge takes, whatever the tensor's size."""


@dataclass(frozen=True)
class Block:
    """Rows `start` to `start + count` of a step's tensor; a vector's elements are its rows."""

    step: Step
    start: int
    count: int


def blocks_of(step: Step) -> Iterator[Block]:
    """The blocks of a tensor, in order. How it is cut depends on its shape alone, so that it is the same on every machine."""
    rows = step.shape[0] if step.shape else 1
    per_row = math.prod(step.shape[1:]) * 2  # bytes, of bfloat16; wider dtypes make wider blocks
    each = max(1, BLOCK_BYTES // max(1, per_row))
    for start in range(0, rows, each):
        yield Block(step, start, min(each, rows - start))


def block_bytes(block: Block, dtype: str) -> int:
    """Bytes of the block's rows in `dtype`, safetensors' name."""
    return block.count * math.prod(block.step.shape[1:]) * BITS[dtype] // 8


def compute(
    block: Block, base: Tensor, change: Change, options: MergeOptions, buffer: bytearray | None = None
) -> tuple[Tensor, Kept]:
    """The block's rows of the output, of the step's dtype, and how much of the update they kept.

    - `base`: the same rows of what the step starts from (the base's, or the replacement's), of any floating dtype
    - `change`: the whole tensor's; `buffer`: memory for the result, `block_bytes` or more

    Raises `NonFiniteError` where NaN or infinity goes in or comes out of a sum.
    """
    step = block.step
    matrix = base.reshape(base.shape[0], math.prod(base.shape[1:])) if base.dim() > 1 else base.reshape(-1, 1)  # (rows, columns)
    dtype = TORCH_DTYPES[step.dtype]
    out = torch.empty(matrix.shape, dtype=dtype) if buffer is None else tensor_over(buffer, dtype, tuple(matrix.shape))
    here = change.narrow(block.start, block.count)
    rounding = options.rounding if options.rounding == "nearest" else _noise(block, matrix.shape[1], options.seed)
    if here.rescale is not None:
        kept = rescaled(matrix, here, out, rounding)
    else:
        _, kept = merge_measured(matrix, here.updates, out=out, precision=options.precision, rounding=rounding)
    if here.rows is not None:
        here.rows.put(out)
    if here.updates and not math.isfinite(kept.dot + kept.square):  # no number that is not finite hides from the inner products
        _settle_nonfinite(block, matrix, out, options)
        kept = Kept()  # finite numbers, too large for their squares, or not measured for what was let through
    if not here.updates and step.action in ("cast", "replace", "rows") and not out.isfinite().all():
        _settle_nonfinite(block, matrix, out, options, merged=False)
    return out.view(base.shape), kept


def _settle_nonfinite(block: Block, matrix: Tensor, out: Tensor, options: MergeOptions, *, merged: bool = True) -> None:
    """Refuse what is not finite in a block, or mend it as `options` ask; what is only cast may hold what the base holds."""
    if merged and not options.allow_nonfinite_base:
        _refuse(block, matrix, ~matrix.isfinite(), "in the base", "the base checkpoint is damaged; --allow-nonfinite-base keeps it")
    if options.on_overflow == "clamp":
        largest = torch.finfo(out.dtype).max
        out.copy_(torch.where(out.isinf() & matrix.isfinite(), out.clamp(-largest, largest), out))
    what = "after merging into" if merged else "after rounding to"
    hint = "a wider --dtype holds larger numbers, --on-overflow clamp puts the largest that this one has"
    _refuse(block, out, ~out.isfinite() & matrix.isfinite(), f"{what} {block.step.dtype}", hint)


def _noise(block: Block, columns: int, seed: int) -> Stochastic:
    return Stochastic(seed, block.step.tensor, block.start * columns)


def _refuse(block: Block, matrix: Tensor, bad: Tensor, where: str, hint: str) -> None:
    if not bad.any():
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    index = [block.start + row, column] if len(block.step.shape) > 1 else [block.start + row]
    raise NonFiniteError(
        f"tensor '{printable(block.step.tensor)}' holds {int(bad.sum())} numbers that are not finite {where},"
        f" the first at {index}: {float(matrix[row, column])}",
        hint=f"nothing was written; {hint}",
    )

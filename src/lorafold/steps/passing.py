"""Blocks that go from file to file in one pass of compiled code, where all that is done to them is to add an update."""

from __future__ import annotations

import torch

from ..kernel import FileRows, Kept, merge_between
from ..tensorfile import TORCH_DTYPES, tensor_over
from .blocks import Block, block_bytes
from .change import Change
from .shortage import naming_the_tensor
from .sources import Sources

LEAST = 1024 * 1024
"""Bytes of a block below which it stays in the processor's cache anyway."""


@naming_the_tensor
def pass_through(
    block: Block, change: Change, sources: Sources, fd: int, start: int, *, found: bytearray | None = None
) -> tuple[int, Kept]:
    """Write the block's rows of the output to the file open as `fd`, from byte `start` on; or compare them with what is there.

    - `change`: the whole tensor's
    - `found`: memory of `block_bytes` or more: what is there is read into it, and nothing is written

    How many rows that went well with, from the first on, and what they kept. The rest, often all, is for `compute`, which also says
    what is the matter with them.
    """
    source = sources.rows(block)
    if (
        source is None
        or change.transforms
        or sources.plan.options.rounding != "nearest"
        or block_bytes(block, block.step.dtype) < LEAST
    ):
        return 0, Kept()
    target = FileRows(fd, start, TORCH_DTYPES[block.step.dtype], block.columns)
    room = None if found is None else tensor_over(found, torch.uint8, (block_bytes(block, block.step.dtype),))
    done, kept = 0, Kept()
    for piece, low, high in change.within(block.start, block.start + block.count):
        if piece.factors is None:
            break
        count, of_piece = merge_between(
            source.after(done),
            target.after(done),
            high - low,
            piece.factors,
            low - piece.start,
            precision=sources.plan.options.precision,
            found=None if room is None else room[done * target.row_bytes :],
        )
        done, kept = done + count, kept + of_piece
        if count < high - low:
            break
    return done, kept

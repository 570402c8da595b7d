"""Blocks that go from file to file in one pass of compiled code, where all that is done to them is to add an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..files.safetensors.buffers import tensor_over
from ..files.safetensors.dtypes import TORCH_DTYPES
from ..kernel.cpu.stream import Destination, FileRows, merge_between
from ..kernel.stats import Kept
from .blocks import Block, block_bytes
from .change import Change, Piece
from .shortage import naming_the_tensor
from .sources import Sources

LEAST = 1024 * 1024
"""Bytes of a block below which it stays in the processor's cache anyway."""


@dataclass(frozen=True, eq=False)
class Way:
    """What is made of a block's rows of the base, and where it goes: to the file open as `fd`, from byte `start` on.

    - `change`: the whole tensor's
    - `found`: memory of `block_bytes` or more; then what is in the file is read into it and compared, and nothing is written
    """

    block: Block
    change: Change
    fd: int
    start: int
    found: bytearray | None = None

    @property
    def target(self) -> FileRows:
        """Where the rows lie in the file."""
        return FileRows(self.fd, self.start, TORCH_DTYPES[self.block.step.dtype], self.block.columns)

    def destination(self, low: int, high: int) -> Destination | None:
        """Of the tensor's rows `low` to `high`, which are of one piece of the change; None where nothing is added to them."""
        piece = self._piece(low)
        if piece.factors is None:
            return None
        before, row_bytes, found = low - self.block.start, self.target.row_bytes, None
        if self.found is not None:
            found = tensor_over(memoryview(self.found)[before * row_bytes :], torch.uint8, ((high - low) * row_bytes,))
        return Destination(self.target.after(before), piece.factors, low - piece.start, found)

    def _piece(self, row: int) -> Piece:
        return next(piece for piece in self.change.pieces if piece.start <= row < piece.stop)


@naming_the_tensor
def pass_through(block: Block, sources: Sources, ways: Sequence[Way]) -> tuple[int, list[Kept]]:
    """Read the block's rows of the base once, and send them all `ways`, which have blocks of the same rows.

    How many rows that went well with, from the first on, and what of its update each way kept in them. The rest, often all, is for
    `compute`, which also says what is the matter with them.
    """
    done, kept = 0, [Kept() for _ in ways]
    source, options = sources.rows(block), sources.plan.options
    if source is None or options.rounding != "nearest" or any(way.change.transforms for way in ways):
        return done, kept
    if block_bytes(block, block.step.dtype) < LEAST:
        return done, kept
    stop = block.start + block.count
    edges = {edge for way in ways for piece in way.change.pieces for edge in (piece.start, piece.stop)}
    for low, high in pairwise([block.start, *sorted(edge for edge in edges if block.start < edge < stop), stop]):
        destinations = [way.destination(low, high) for way in ways]
        ready = [each for each in destinations if each is not None]
        if len(ready) < len(ways):
            break
        count, here = merge_between(source.after(done), high - low, ready, precision=options.precision)
        done, kept = done + count, [one + other for one, other in zip(kept, here, strict=True)]
        if count < high - low:
            break
    return done, kept

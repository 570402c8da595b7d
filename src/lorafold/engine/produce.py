"""The one function that makes the bytes of blocks: to write them, or to compare them with what was written.

Where all that is done to rows which lie in a file is to add updates, and to rescale, they go from file to file in compiled code;
all else goes by memory, and so does what compiled code leaves over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.info import TORCH_DTYPES
from ..files.safetensors.writer import ShardWriter
from ..kernel.cpu.codes import CodedRows
from ..kernel.cpu.multiplying import multiply_between
from ..kernel.cpu.recoding import cast_between, recode_between
from ..kernel.cpu.rescaling import rescale_between
from ..kernel.cpu.stream import FileRows, merge_between
from ..kernel.cpu.turning import rotate_between
from ..kernel.merge import Precision
from ..kernel.rounding import noise_of
from ..kernel.stats import Kept
from ..planning.plan import Step
from .blocks import Block, block_bytes, block_offset, compute, head_of, naming_the_tensor, rounding_of, sums
from .change import Change
from .sources import Sources
from .threads import Buffers, Once

LEAST = 1024 * 1024
"""Bytes of a block below which it stays in the processor's cache anyway."""


class BlockSink(Protocol):
    """Where the bytes of blocks go."""

    def rows(self, block: Block) -> FileRows:
        """Where compiled code writes the block, or what it compares it with."""
        ...

    def passed(self, block: Block, rows: int) -> None:
        """The first `rows` of the block went there so."""
        ...

    def put(self, block: Block, made: Tensor) -> None:
        """Take all of the block, (count, columns), made in memory."""
        ...


@dataclass(frozen=True, eq=False)
class OutputBlock:
    """A block of an output, what makes it of the rows that it starts from, and where its bytes go.

    - `sources`, `change`: the plan's, and that of the whole tensor
    - `kept`: by tensor, what its blocks kept of the update so far
    """

    block: Block
    sources: Sources
    change: Once[Change]
    sink: BlockSink
    kept: dict[str, Kept]

    def after(self, rows: int) -> OutputBlock:
        """The same without the block's first `rows`."""
        return replace(self, block=self.block.after(rows)) if rows else self

    @property
    def head(self) -> OutputBlock:
        """The same of as many rows as are done in memory at once."""
        return replace(self, block=head_of(self.block))

    def count(self, kept: Kept) -> None:
        """Add what was kept of the block, or a part of it, to that of its tensor."""
        step = self.block.step
        if step.action in ("merge", "encode") or kept.clamped:
            self.kept[step.tensor] = self.kept.get(step.tensor, Kept()) + kept


@dataclass(frozen=True, eq=False)
class WritingSink:
    """The sink that writes blocks into the file of `writer`."""

    writer: ShardWriter

    def rows(self, block: Block) -> FileRows:
        """Where in the file the block lies."""
        place = self.writer.place(self.writer.tensors[block.step.tensor], block_offset(block), block_bytes(block, block.step.dtype))
        return rows_in(block, *place)

    def passed(self, block: Block, rows: int) -> None:
        """Tell the writer."""
        row_bytes = block_bytes(block, block.step.dtype) // max(1, block.count)
        self.writer.wrote(self.writer.tensors[block.step.tensor], block.start * row_bytes, rows * row_bytes)

    def put(self, block: Block, made: Tensor) -> None:
        """Write it."""
        self.writer.write(self.writer.tensors[block.step.tensor], block_offset(block), bytes_of(made))


def rows_in(block: Block, fd: int, start: int, found: Tensor | None = None) -> FileRows:
    """The rows of the block in an output that is open as `fd`, from byte `start` on; of codes their bytes."""
    if block.step.action != "encode":
        return FileRows(fd, start, TORCH_DTYPES[block.step.dtype], block.columns, found)
    return FileRows(fd, start, torch.uint8, block_bytes(block, block.step.dtype) // block.count, found)


def is_moved(step: Step, sources: Sources) -> bool:
    """Whether its bytes are those of a tensor of the base, and nothing is made."""
    return step.action == "copy" and sources.stored(step) is not None


def produce(parts: Sequence[OutputBlock], buffers: Buffers) -> list[tuple[OutputBlock, Kept]]:
    """Make `parts`, whose blocks start from the same rows of the base, which are read once, and give each to its sink.

    What each kept of its update, for `OutputBlock.count`: of its first rows, and then of the others where they went another way.

    Raises `NonFiniteError` where NaN or infinity goes in or comes out of a sum, and what reading and a sink raise.
    """
    found: list[tuple[OutputBlock, Kept]] = []
    while True:
        block = parts[0].block
        done, passed = _pass_through(block, parts)
        found += zip(parts, passed, strict=True)
        if done == block.count:
            return found
        rest = [part.after(done) for part in parts]
        heads = [part.head for part in rest]
        found += _by_memory(heads, buffers)
        if heads[0].block.count == rest[0].block.count:
            return found
        parts = [part.after(heads[0].block.count) for part in rest]


def _by_memory(parts: Sequence[OutputBlock], buffers: Buffers) -> list[tuple[OutputBlock, Kept]]:
    """`produce` in memory."""
    found: list[tuple[OutputBlock, Kept]] = []
    base, taken = parts[0].sources.start(parts[0].block, buffers)
    for part in parts:
        options = part.sources.plan.options
        if part.block.step.action == "encode":
            made, kept = part.sources.codes(part.block, base, sums(part.block, base, part.change(), options))
            part.sink.put(part.block, made)
            found.append((part, kept))
            continue
        room = buffers.take(block_bytes(part.block, part.block.step.dtype))
        made, kept = compute(part.block, base, part.change(), options, room)
        part.sink.put(part.block, made)
        buffers.give(room)
        found.append((part, kept))
    buffers.give(taken)
    return found


@naming_the_tensor
def _pass_through(block: Block, parts: Sequence[OutputBlock]) -> tuple[int, list[Kept]]:
    """Read the block's rows of the base once, and send them through compiled code to the sinks of all `parts`.

    How many rows that went well with, from the first on, and what of its update each part kept in them. The rest, often all, is for
    `compute`, which also says what is the matter with them.
    """
    done, kept = 0, [Kept() for _ in parts]
    changes = [part.change() for part in parts]
    source, options = parts[0].sources.rows(block), parts[0].sources.plan.options
    if source is None or any(not change.streams(block.count) for change in changes):
        return done, kept
    if isinstance(source, CodedRows):
        done, kept = _decoded_through(block, source, parts, options.precision)
    elif block_bytes(block, block.step.dtype) < LEAST:
        return done, kept
    else:
        through = (
            _each_through if any(change.stages or change.elements or change.rotation for change in changes) else _added_through
        )
        done, kept = through(block, source, parts, options.precision)
    for part in parts:
        part.sink.passed(part.block, done)
    return done, kept


def _each_through(block: Block, source: FileRows, parts: Sequence[OutputBlock], precision: Precision) -> tuple[int, list[Kept]]:
    """The same where some do more than add updates: each part by itself, reading the rows again, and all of the rows or none."""
    kept = []
    for part in parts:
        change, target = part.change(), part.sink.rows(part.block)
        noise = noise_of(rounding_of(block.start, part.block, part.sources.plan.options), target.dtype)
        if change.rotation is not None:
            done, share = rotate_between(source, block.count, target, change.rotation, block.start, noise)
        elif change.elements is not None:
            done, share = multiply_between(source, block.count, target, change.elements, block.start, precision, noise)
        elif change.stages:
            done, share = rescale_between(source, block.count, target, change.stages, block.start, noise)
        else:
            done, (share,) = _added_through(block, source, [part], precision)
        if done < block.count:
            if len(parts) == 1:
                return done, [share]
            return 0, [Kept() for _ in parts]
        kept.append(share)
    return block.count, kept


def _added_through(block: Block, source: FileRows, parts: Sequence[OutputBlock], precision: Precision) -> tuple[int, list[Kept]]:
    """The same where all only add: rows are read once for all of them."""
    changes, targets = [part.change() for part in parts], [part.sink.rows(part.block) for part in parts]
    done, kept = 0, [Kept() for _ in targets]
    stop = block.start + block.count
    edges = {edge for change in changes for piece in change.pieces for edge in (piece.start, piece.stop)}
    for low, high in pairwise([block.start, *sorted(edge for edge in edges if block.start < edge < stop), stop]):
        pieces = [change.piece(low) for change in changes]
        updates = [(piece.factors, low - piece.start) for piece in pieces if piece.factors is not None]
        if len(updates) < len(targets):  # to one of them nothing is added there
            break
        here = [target.after(low - block.start) for target in targets]
        count, shares = merge_between(
            source.after(done),
            high - low,
            here,
            updates,
            precision=precision,
            roundings=[rounding_of(low, part.block, part.sources.plan.options) for part in parts],
        )
        done, kept = done + count, [one + other for one, other in zip(kept, shares, strict=True)]
        if count < high - low:
            break
    return done, kept


def _decoded_through(block: Block, source: CodedRows, parts: Sequence[OutputBlock], precision: Precision) -> tuple[int, list[Kept]]:
    """The same of codes, which are decoded, added to, and rounded or made codes again: each part by itself."""
    kept = []
    for part in parts:
        done, share = _part_decoded(source, part, precision)
        if done < block.count and len(parts) > 1:
            return 0, [Kept() for _ in parts]
        kept.append(share)
    return done, kept


def _part_decoded(source: CodedRows, part: OutputBlock, precision: Precision) -> tuple[int, Kept]:
    block, change, sources = part.block, part.change(), part.sources
    target, rule = part.sink.rows(block), sources.rule(block)
    done, kept = 0, Kept()
    other = change.stages or any(each is not None for each in (change.elements, change.rotation, change.whole))
    if other or (block.step.action == "encode" and rule is None):
        return done, kept
    for piece, low, high in change.within(block.start, block.start + block.count):
        here, there, rows = source.after(done), target.after(done), high - low
        if rule is not None:
            if piece.factors is None:
                break
            count, share = recode_between(here, rows, there, (piece.factors, low - piece.start), rule, sources.noise(block, low))
        elif piece.factors is None:
            count, share = cast_between(here, rows, there)
        else:
            updates, roundings = [(piece.factors, low - piece.start)], [rounding_of(low, block, sources.plan.options)]
            count, (share,) = merge_between(here, rows, [there], updates, precision=precision, roundings=roundings)
        done, kept = done + count, kept + share
        if count < rows:
            break
    return done, kept

"""`run`: the output's files, written in order. Reading, computing, writing and the disk's own work go on at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from ..checkpoint import write_index
from ..kernel import Kept
from ..planning import PlannedShard, Step, nbytes
from ..steps import Block, Sources, blocks_of, compute
from ..tensorfile import ShardWriter, TensorSpec
from ..update import LowRankUpdate


def run(sources: Sources, folder: Path, *, on_bytes: Callable[[int], None] | None = None) -> dict[str, Kept]:
    """Write the files of the plan of `sources` into `folder`, on disk when this returns; kept, by merged tensor.

    `on_bytes` is called with the number of bytes after each write, from the thread that wrote.

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written; `folder` is then not complete.
    """
    plan = sources.plan
    kept: dict[str, Kept] = {}
    with ThreadPoolExecutor(1, "finish") as finishing:
        last: Future[None] | None = None
        for shard in plan.shards:
            with ExitStack() as unless_done:
                writer = unless_done.enter_context(ShardWriter(folder / shard.name, _specs(shard, sources), on_bytes=on_bytes))
                kept |= _fill(writer, shard, sources)
                unless_done.pop_all()
            if last is not None:
                last.result()
            last = finishing.submit(writer.close)  # waits for the disk, while the next file is begun
        if last is not None:
            last.result()
    if len(plan.shards) > 1 or sources.checkpoint.indexed:
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in _specs(shard, sources))
        write_index(folder, weight_map, total)
    return kept


def _specs(shard: PlannedShard, sources: Sources) -> list[TensorSpec]:
    specs = []
    for step in shard.steps:
        size = sources.base(step)[1].nbytes if step.action == "copy" else nbytes(step)
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, size))
    return specs


def _fill(writer: ShardWriter, shard: PlannedShard, sources: Sources) -> dict[str, Kept]:
    """Write all tensors of one file; kept, by merged tensor."""
    kept: dict[str, Kept] = {}
    with (
        ThreadPoolExecutor(1, "copy") as copying,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "write") as writing,
    ):
        copied = copying.submit(_copy, writer, shard, sources)
        written: Future[None] | None = None
        for block, base, updates in _ahead(reading, shard, sources):
            merged, share = compute(block, base, updates, sources.plan.options)
            if block.step.action == "merge":
                kept[block.step.tensor] = kept.get(block.step.tensor, Kept()) + share
            if written is not None:
                written.result()
            written = writing.submit(writer.write_tensor, writer.tensors[block.step.tensor], merged, row=block.start)
        if written is not None:
            written.result()
        copied.result()
    return kept


def _copy(writer: ShardWriter, shard: PlannedShard, sources: Sources) -> None:
    """Move the untouched tensors, as whole runs of bytes where they lie together on both sides."""
    by_file: dict[int, list[Step]] = {}
    for step in shard.steps:
        if step.action == "copy":
            by_file.setdefault(sources.base(step)[0].fileno(), []).append(step)
    for steps in by_file.values():
        source = sources.base(steps[0])[0]
        writer.copy_all([(writer.tensors[step.tensor], sources.base(step)[1]) for step in steps], source)


Read = tuple[Block, Tensor, tuple[LowRankUpdate, ...]]


def _ahead(reading: ThreadPoolExecutor, shard: PlannedShard, sources: Sources) -> Iterator[Read]:
    """The blocks that are computed, each with what it is computed from; the next one is read meanwhile."""
    waiting: Future[Read] | None = None
    updates: tuple[LowRankUpdate, ...] = ()
    for step in shard.steps:
        if step.action == "copy":
            continue
        for block in blocks_of(step):
            if block.start == 0:
                updates = sources.updates(step)
            following = reading.submit(_read, block, updates, sources)
            if waiting is not None:
                yield waiting.result()
            waiting = following
    if waiting is not None:
        yield waiting.result()


def _read(block: Block, updates: tuple[LowRankUpdate, ...], sources: Sources) -> Read:
    if block.step.action == "replace":
        reader, info = sources.replacement(block.step)
        return block, reader.rows(info, block.start, block.count), updates
    file, info = sources.base(block.step)
    return block, file.read_rows(info, block.start, block.count), updates

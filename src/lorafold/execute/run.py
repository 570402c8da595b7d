"""`run`: the output's files, written in order.

Each thread reads a block, computes and writes it; beside them one moves untouched bytes and one waits for the disk to finish a
file. So reading, computing, writing and the disk's own work go on at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from ..checkpoint import Finished, write_index
from ..errors import CheckpointError
from ..kernel import Kept
from ..planning import PlannedShard, Step, nbytes, needs_index
from ..regularfile import sha256_of
from ..steps import Block, Buffers, Change, Sources, Workers, block_bytes, blocks_of, compute, workers
from ..tensorfile import ShardWriter, TensorSpec, bytes_of


def run(
    sources: Sources,
    folder: Path,
    *,
    done: Mapping[str, Finished] | None = None,
    check: Callable[[str], str] | None = None,
    on_finished: Callable[[Finished], None] | None = None,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Finished]:
    """Write the files of the plan of `sources` into `folder`, on disk when this returns; each file's hash and what it kept.

    - `done`: files that stand in `folder` already and are not written again
    - `check`: called with the name of a file that has all its bytes; it reads them back, proves them and returns their sha256
    - `on_finished`: called when a file is on disk and checked
    - `threads`: that compute, by default one a processor
    - `on_bytes`: called with the number of bytes after each write, from the thread that wrote

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written, and what `check` raises; `folder` is then not complete.
    """
    plan = sources.plan
    finished: dict[str, Finished] = {}
    buffers = Buffers()

    def finish(entry: Finished) -> None:
        finished[entry.name] = entry
        if on_finished is not None:
            on_finished(entry)

    def close_unchecked(writer: ShardWriter, name: str, kept: Mapping[str, Kept]) -> None:
        writer.close()
        finish(Finished(name, sha256_of(folder / name, error=CheckpointError), False, _pairs(kept)))

    with workers(threads) as pool, ThreadPoolExecutor(1, "finish") as finishing:
        last: Future[None] | None = None
        for shard in plan.shards:
            if done is not None and shard.name in done:
                entry = done[shard.name]
                if check is None or entry.proven:
                    finished[shard.name] = entry
                else:
                    finish(Finished(entry.name, check(entry.name), True, entry.kept))
                continue
            kept: dict[str, Kept] = {}
            with ExitStack() as unless_done:
                writer = unless_done.enter_context(ShardWriter(folder / shard.name, _specs(shard, sources), on_bytes=on_bytes))
                _fill(writer, shard, sources, pool, buffers, kept)
                unless_done.pop_all()
            if check is not None:
                closing = finishing.submit(writer.close)  # waits for the disk, while the bytes are read back
                sha256 = check(shard.name)
                closing.result()
                finish(Finished(shard.name, sha256, True, _pairs(kept)))
                continue
            if last is not None:
                last.result()
            last = finishing.submit(close_unchecked, writer, shard.name, kept)  # while the next file is begun
        if last is not None:
            last.result()
    if needs_index(plan, sources.checkpoint):
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in _specs(shard, sources))
        write_index(folder, weight_map, total)
    return finished


def _pairs(kept: Mapping[str, Kept]) -> dict[str, tuple[float, float]]:
    return {tensor: (each.dot, each.square) for tensor, each in kept.items()}


def _specs(shard: PlannedShard, sources: Sources) -> list[TensorSpec]:
    specs = []
    for step in shard.steps:
        size = sources.base(step)[1].nbytes if step.action == "copy" else nbytes(step)
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, size))
    return specs


def _fill(
    writer: ShardWriter, shard: PlannedShard, sources: Sources, pool: Workers, buffers: Buffers, kept: dict[str, Kept]
) -> None:
    """Write all tensors of one file, and put into `kept` what was kept of each merged one."""

    def work(job: tuple[Block, Change]) -> tuple[Block, Kept]:
        block, change = job
        base, taken = sources.start(block, buffers)
        room = buffers.take(block_bytes(block, block.step.dtype))
        merged, share = compute(block, base, change, sources.plan.options, room)
        writer.write(writer.tensors[block.step.tensor], block.offset * merged.element_size(), bytes_of(merged))
        buffers.give(taken, room)
        return block, share

    with ThreadPoolExecutor(1, "copy") as copying:
        copied = copying.submit(_copy, writer, shard, sources)
        for block, share in pool.results(work, _jobs(shard, sources)):
            if block.step.action == "merge":
                kept[block.step.tensor] = kept.get(block.step.tensor, Kept()) + share
        copied.result()


def _jobs(shard: PlannedShard, sources: Sources) -> Iterator[tuple[Block, Change]]:
    for step in shard.steps:
        if step.action != "copy":
            change = sources.change(step)
            yield from ((block, change) for block in blocks_of(step))


def _copy(writer: ShardWriter, shard: PlannedShard, sources: Sources) -> None:
    """Move the untouched tensors, as whole runs of bytes where they lie together on both sides."""
    by_file: dict[int, list[Step]] = {}
    for step in shard.steps:
        if step.action == "copy":
            by_file.setdefault(sources.base(step)[0].fileno(), []).append(step)
    for steps in by_file.values():
        source = sources.base(steps[0])[0]
        writer.copy_all([(writer.tensors[step.tensor], sources.base(step)[1]) for step in steps], source)

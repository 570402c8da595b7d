"""`run`: the output's files, written in order.

Threads read blocks and compute them; this one writes what they made, in order, and moves untouched bytes in between, since the
system lets only one at a time write to a file; one more waits for the disk to finish a file. So reading, computing, writing and the
disk's own work go on at the same time, across the ends of files too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

from torch import Tensor

from ..checkpoint import Finished, write_index
from ..errors import CheckpointError
from ..kernel import Kept
from ..planning import PlannedShard, Step, nbytes, needs_index
from ..regularfile import sha256_of, state_of
from ..steps import Block, Buffers, Change, Once, Sources, block_bytes, blocks_of, compute, workers
from ..tensorfile import CopyRun, ShardWriter, TensorFile, TensorSpec, bytes_of


@dataclass(frozen=True, eq=False)
class _File:
    """A file that is being written, and what was kept of each tensor merged so far."""

    name: str
    writer: ShardWriter
    kept: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Merge:
    """A block to be computed and written."""

    file: _File
    block: Block
    change: Once[Change]


@dataclass(frozen=True, eq=False)
class _Copy:
    """Bytes to be moved as they are."""

    file: _File
    source: TensorFile
    run: CopyRun


@dataclass(frozen=True, eq=False)
class _End:
    """Nothing more comes for the file."""

    file: _File


@dataclass(frozen=True, eq=False)
class _Merged:
    """A block that was computed, its rows of the output, and the buffers to be given back when it is written."""

    file: _File
    block: Block
    rows: Tensor
    kept: Kept
    buffers: tuple[bytearray, ...]


def run(
    sources: Sources,
    folder: Path,
    *,
    done: Mapping[str, Finished] | None = None,
    check: Callable[[str], str] | None = None,
    hashed: bool = False,
    on_finished: Callable[[Finished], None] | None = None,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Finished]:
    """Write the files of the plan of `sources` into `folder`, on disk when this returns; each file's hash and what it kept.

    - `done`: files that stand in `folder` already and are not written again
    - `check`: called with the name of a file that has all its bytes; it reads them back, proves them and returns their sha256
    - `hashed`: read every file back for its sha256 where nothing checks it; otherwise such a file has none
    - `on_finished`: called when a file is on disk and checked
    - `threads`: that compute, by default one a processor
    - `on_bytes`: called with the number of bytes after each write

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written, and what `check` raises; `folder` is then not complete.
    """
    plan = sources.plan
    finished: dict[str, Finished] = {}
    buffers = Buffers()

    def finish(name: str, sha256: str, kept: Mapping[str, Kept], *, proven: bool) -> None:
        entry = Finished(name, sha256, proven, _pairs(kept), state_of(folder / name, error=CheckpointError))
        finished[name] = entry
        if on_finished is not None:
            on_finished(entry)

    def close_unchecked(file: _File) -> None:
        file.writer.close()
        sha256 = sha256_of(folder / file.name, error=CheckpointError) if hashed else ""
        finish(file.name, sha256, file.kept, proven=False)

    def work(job: _Merge | _Copy | _End) -> _Merged | _Copy | _End:
        if not isinstance(job, _Merge):
            return job
        base, taken = sources.start(job.block, buffers)
        room = buffers.take(block_bytes(job.block, job.block.step.dtype))
        merged, kept = compute(job.block, base, job.change(), plan.options, room)
        return _Merged(job.file, job.block, merged, kept, (taken, room))

    for shard in plan.shards:
        entry = (done or {}).get(shard.name)
        if entry is None:
            continue
        if check is None or entry.proven:
            finished[shard.name] = entry
        else:
            finish(entry.name, check(entry.name), _kept(entry.kept), proven=True)
    with ExitStack() as unless_done, workers(threads) as pool, ThreadPoolExecutor(1, "finish") as finishing:
        closing: Future[None] | None = None  # of the file before

        def files() -> Iterator[tuple[PlannedShard, _File]]:
            for shard in plan.shards:
                if shard.name not in finished:
                    writer = ShardWriter(folder / shard.name, _specs(shard, sources), on_bytes=on_bytes)
                    unless_done.push(writer.__enter__().__exit__)
                    yield shard, _File(shard.name, writer)

        for result in pool.results(work, chain.from_iterable(_jobs(file, shard, sources) for shard, file in files())):
            file = result.file
            if isinstance(result, _Merged):
                _write(result, buffers)
            elif isinstance(result, _Copy):
                file.writer.copy_run(result.run, result.source)
            elif check is None:
                if closing is not None:
                    closing.result()
                closing = finishing.submit(close_unchecked, file)  # while the next file is written
            else:
                closing = finishing.submit(file.writer.close)  # waits for the disk, while the bytes are read back
                sha256 = check(file.name)
                closing.result()
                finish(file.name, sha256, file.kept, proven=True)
        if closing is not None:
            closing.result()
        unless_done.pop_all()
    if needs_index(plan, sources.checkpoint):
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in _specs(shard, sources))
        write_index(folder, weight_map, total, sources.checkpoint.index_name)
    return finished


def _write(result: _Merged, buffers: Buffers) -> None:
    file, block = result.file, result.block
    name = block.step.tensor
    file.writer.write(file.writer.tensors[name], block.offset * result.rows.element_size(), bytes_of(result.rows))
    buffers.give(*result.buffers)
    if block.step.action == "merge" or result.kept.clamped:
        file.kept[name] = file.kept.get(name, Kept()) + result.kept


def _pairs(kept: Mapping[str, Kept]) -> dict[str, tuple[float, ...]]:
    return {tensor: each.numbers for tensor, each in kept.items()}


def _kept(pairs: Mapping[str, tuple[float, ...]]) -> dict[str, Kept]:
    return {tensor: Kept.of(pair) for tensor, pair in pairs.items()}


def _specs(shard: PlannedShard, sources: Sources) -> list[TensorSpec]:
    specs = []
    for step in shard.steps:
        size = sources.base(step)[1].nbytes if step.action == "copy" else nbytes(step)
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, size))
    return specs


def _jobs(file: _File, shard: PlannedShard, sources: Sources) -> Iterator[_Merge | _Copy | _End]:
    """Everything that is to be done for one file, what is moved in between what is computed."""
    for merge, copy in zip_longest(_merges(file, shard, sources), _copies(file, shard, sources)):
        if merge is not None:
            yield merge
        if copy is not None:
            yield copy
    yield _End(file)


def _merges(file: _File, shard: PlannedShard, sources: Sources) -> Iterator[_Merge]:
    for step in shard.steps:
        if step.action != "copy":
            change = Once(partial(sources.change, step))  # made by the thread that does the first block
            yield from (_Merge(file, block, change) for block in blocks_of(step))


def _copies(file: _File, shard: PlannedShard, sources: Sources) -> Iterable[_Copy]:
    """The untouched tensors, as whole runs of bytes where they lie together on both sides."""
    by_source: dict[int, list[Step]] = {}
    for step in shard.steps:
        if step.action == "copy":
            by_source.setdefault(sources.base(step)[0].fileno(), []).append(step)
    for steps in by_source.values():
        source = sources.base(steps[0])[0]
        runs = file.writer.copy_runs([(file.writer.tensors[step.tensor], sources.base(step)[1]) for step in steps])
        yield from (_Copy(file, source, each) for each in runs)

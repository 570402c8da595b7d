"""`run`: the outputs' files, written in order.

Threads read blocks and compute them; this one writes what they made, in order, and moves untouched bytes in between, since the
system lets only one at a time write to a file; two more wait for the disk to finish a file, and read it back and prove it. So
reading, computing, writing, proving and the disk's own work go on at the same time, across the ends of files too. Several outputs
of one base are written side by side: a block of the base is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ..checkpoint import write_index
from ..errors import CheckpointError
from ..kernel import Kept
from ..planning import PlannedShard, Step, nbytes, needs_index
from ..regularfile import sha256_of, state_of
from ..staging import Finished
from ..steps import Block, Buffers, Change, Once, Sources, block_bytes, blocks_of, compute, matrix_shape, workers
from ..tensorfile import CopyRun, ShardWriter, TensorFile, TensorSpec, bytes_of

OnBytes = Callable[[int], None]
"""Called with each number of bytes done, from any thread."""


@dataclass(frozen=True, eq=False)
class Output:
    """A checkpoint to be written: the files of the plan of `sources`, in `folder`.

    - `done`: files that stand in `folder` already and are not written again
    - `check`: called with the name of a file that has all its bytes, and with what it must tell of each number of bytes done; it
      reads them back, proves them and returns their sha256
    - `hashed`: read every file back for its sha256 where nothing checks it; otherwise such a file has none
    - `on_finished`: called when a file is on disk and checked
    """

    sources: Sources
    folder: Path
    done: Mapping[str, Finished] = field(default_factory=dict)
    check: Callable[[str, OnBytes], str] | None = None
    hashed: bool = False
    on_finished: Callable[[Finished], None] | None = None
    finished: dict[str, Finished] = field(default_factory=dict)

    def finish(self, name: str, sha256: str, kept: Mapping[str, Kept], *, proven: bool) -> None:
        """Note that the file `name` is on disk."""
        state = state_of(self.folder / name, error=CheckpointError)
        self.finished[name] = Finished(name, sha256, proven, _pairs(kept), state)
        if self.on_finished is not None:
            self.on_finished(self.finished[name])


@dataclass(frozen=True, eq=False)
class _File:
    """A file that is being written, and what was kept of each tensor merged so far."""

    output: Output
    shard: PlannedShard
    writer: ShardWriter
    kept: dict[str, Kept] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Part:
    """A block of one file, and what makes it of the rows that it starts from."""

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


_Job = tuple[_Part, ...] | _Copy | _End
"""Blocks that start from the same rows; or what needs no thread but the one that writes."""


@dataclass(frozen=True, eq=False)
class _Merged:
    """A block that was computed, its rows of the output, and the buffer to be given back when it is written."""

    part: _Part
    rows: Tensor
    kept: Kept
    buffer: bytearray


def run(
    outputs: Sequence[Output], *, threads: int | None = None, on_bytes: OnBytes | None = None, one_at_a_time: bool = False
) -> list[dict[str, Finished]]:
    """Write the files of all `outputs`, which have the same base; they are on disk when this returns. Each output's files, by name.

    - `threads`: that compute, by default one a processor
    - `on_bytes`: called with the number of bytes after each write, and after each that was proven
    - `one_at_a_time`: prove a file before the next is written, for less memory

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written, and what a `check` raises; the folders are then not complete.
    """
    buffers = Buffers()
    with ExitStack() as unless_done, _Closing(on_bytes or _ignore) as closing, workers(threads) as pool:
        for output in outputs:
            _take_over(output, closing.on_bytes)
        for result in pool.results(partial(_work, buffers=buffers), _jobs(outputs, unless_done, on_bytes)):
            if isinstance(result, _Copy):
                result.file.writer.copy_run(result.run, result.source)
            elif isinstance(result, _End):
                closing.begin(result.file)
                if one_at_a_time:
                    closing.wait()
            else:
                for merged in result:
                    _write(merged, buffers)
        closing.wait()
        unless_done.pop_all()
    for output in outputs:
        _index(output)
    return [output.finished for output in outputs]


class _StoppedError(Exception):
    """Nobody waits for the proof any more."""


class _Closing:
    """What becomes of a file that has all its bytes, while the next one is written; a context manager.

    One file is closed at a time. After an error, what is still under way is stopped.
    """

    def __init__(self, on_bytes: OnBytes) -> None:
        self._tell = on_bytes
        self._stopped = False
        self._disk = ThreadPoolExecutor(1, "disk")
        self._checks = ThreadPoolExecutor(1, "check")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped = True
        self._checks.shutdown(cancel_futures=True)
        self._disk.shutdown(cancel_futures=True)

    def on_bytes(self, nbytes: int) -> None:
        """Told by a check of its bytes."""
        if self._stopped:
            raise _StoppedError
        self._tell(nbytes)

    def begin(self, file: _File) -> None:
        """Bring `file` to the disk, and prove it, when the file before is done."""
        self.wait()
        closed = self._disk.submit(file.writer.close)  # waits for the disk, while the bytes are read back
        self._last = self._checks.submit(self._conclude, file, closed)

    def wait(self) -> None:
        """Wait for the last file. Raises what went wrong with it."""
        if self._last is not None:
            self._last.result()

    def _conclude(self, file: _File, closed: Future[None]) -> None:
        output, name = file.output, file.shard.name
        sha256 = "" if output.check is None else output.check(name, self.on_bytes)
        closed.result()
        if output.check is None and output.hashed:
            sha256 = sha256_of(output.folder / name, error=CheckpointError)
        output.finish(name, sha256, file.kept, proven=output.check is not None)


def _ignore(nbytes: int) -> None:
    pass


def _take_over(output: Output, on_bytes: OnBytes) -> None:
    """What an earlier run has finished; proven now, where it did not."""
    for shard in output.sources.plan.shards:
        entry = output.done.get(shard.name)
        if entry is not None and output.check is not None and not entry.proven:
            kept = {tensor: Kept.of(numbers) for tensor, numbers in entry.kept.items()}
            output.finish(shard.name, output.check(shard.name, on_bytes), kept, proven=True)
        elif entry is not None:
            output.finished[shard.name] = entry


def _work(job: _Job, buffers: Buffers) -> list[_Merged] | _Copy | _End:
    """Read the rows that the blocks start from, and compute each."""
    if isinstance(job, _Copy | _End):
        return job
    first = job[0]
    base, taken = first.file.output.sources.start(first.block, buffers)
    merged = []
    for part in job:
        room = buffers.take(block_bytes(part.block, part.block.step.dtype))
        rows, kept = compute(part.block, base, part.change(), part.file.output.sources.plan.options, room)
        merged.append(_Merged(part, rows, kept, room))
    buffers.give(taken)
    return merged


def _write(merged: _Merged, buffers: Buffers) -> None:
    file, block = merged.part.file, merged.part.block
    name = block.step.tensor
    file.writer.write(file.writer.tensors[name], block.offset * merged.rows.element_size(), bytes_of(merged.rows))
    buffers.give(merged.buffer)
    if block.step.action == "merge" or merged.kept.clamped:
        file.kept[name] = file.kept.get(name, Kept()) + merged.kept


def _index(output: Output) -> None:
    plan = output.sources.plan
    if needs_index(plan, output.sources.checkpoint):
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in _specs(shard, output.sources))
        write_index(output.folder, weight_map, total, output.sources.checkpoint.index_name)


def _pairs(kept: Mapping[str, Kept]) -> dict[str, tuple[float, ...]]:
    return {tensor: each.numbers for tensor, each in kept.items()}


def _specs(shard: PlannedShard, sources: Sources) -> list[TensorSpec]:
    specs = []
    for step in shard.steps:
        size = sources.base(step)[1].nbytes if step.action == "copy" else nbytes(step)
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, size))
    return specs


def _jobs(outputs: Sequence[Output], unless_done: ExitStack, on_bytes: OnBytes | None) -> Iterator[_Job]:
    """Everything that is to be done, file by file, the first files of all outputs together, then the second; what is moved stands
    in between what is computed."""
    for shards in zip_longest(*(output.sources.plan.shards for output in outputs)):
        files = []
        for output, shard in zip(outputs, shards, strict=True):
            if shard is not None and shard.name not in output.finished:
                writer = ShardWriter(output.folder / shard.name, _specs(shard, output.sources), on_bytes=on_bytes)
                unless_done.push(writer.__enter__().__exit__)
                files.append(_File(output, shard, writer))
        moved = chain.from_iterable(map(_copies, files))
        for parts, copy in zip_longest(_parts(files), moved):
            if parts is not None:
                yield parts
            if copy is not None:
                yield copy
        yield from map(_End, files)


def _parts(files: Sequence[_File]) -> Iterator[tuple[_Part, ...]]:
    """The blocks that are computed, those of several files together that start from the same rows of the base."""
    together: dict[object, list[tuple[_File, Step]]] = {}
    for file in files:
        for step in file.shard.steps:
            if step.action != "copy":
                alone = (file, step.tensor) if step.replacement is not None else None
                together.setdefault((step.source, matrix_shape(step), alone), []).append((file, step))
    for group in together.values():
        changes = [Once(partial(file.output.sources.change, step)) for file, step in group]  # made with the first block
        for blocks in zip(*(blocks_of(step) for _, step in group), strict=True):
            yield tuple(_Part(file, block, change) for (file, _), block, change in zip(group, blocks, changes, strict=True))


def _copies(file: _File) -> Iterable[_Copy]:
    """The untouched tensors, as whole runs of bytes where they lie together on both sides."""
    sources = file.output.sources
    by_source: dict[int, list[Step]] = {}
    for step in file.shard.steps:
        if step.action == "copy":
            by_source.setdefault(sources.base(step)[0].fileno(), []).append(step)
    for steps in by_source.values():
        source = sources.base(steps[0])[0]
        runs = file.writer.copy_runs([(file.writer.tensors[step.tensor], sources.base(step)[1]) for step in steps])
        yield from (_Copy(file, source, each) for each in runs)

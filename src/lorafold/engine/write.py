"""`run`: the outputs' files, written in order.

Threads read blocks, compute and write them, and move untouched bytes in between; others read back what is written and prove it,
close behind, and wait for the disk (`closing`). So reading, computing, writing, proving and the disk's own work go on at the same
time, across the ends of files too. Several outputs of one base are written side by side: a block of the base is read once for all
of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest

from ..checkpoints.index import write_index
from ..errors import CheckpointError
from ..files.atomic.journal import Finished
from ..files.regular import sha256_of
from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.dtypes import TORCH_DTYPES
from ..files.safetensors.reader import TensorFile
from ..files.safetensors.writer import CopyRun, ShardWriter
from ..kernel.stats import Kept
from ..planning.plan import PlannedShard, Step
from ..planning.shards import needs_index
from .blocks import Block, block_bytes, blocks_of, compute, matrix_shape
from .change import Change
from .finish import Closing
from .heads import head_of, specs_of
from .output import OnBytes, OpenFile, Output
from .stream import Way, pass_through
from .threads import Buffers, Once, workers


@dataclass(frozen=True, eq=False)
class _Part:
    """A block of one file, and what makes it of the rows that it starts from."""

    file: OpenFile
    block: Block
    change: Once[Change]

    def after(self, rows: int) -> _Part:
        """The same without the block's first `rows`."""
        return replace(self, block=self.block.after(rows))


@dataclass(frozen=True, eq=False)
class _Copy:
    """Bytes to be moved as they are."""

    file: OpenFile
    source: TensorFile
    run: CopyRun


@dataclass(frozen=True, eq=False)
class _Begin:
    """The file is open."""

    file: OpenFile


@dataclass(frozen=True, eq=False)
class _End:
    """Nothing more comes for the file."""

    file: OpenFile


_Job = tuple[_Part, ...] | _Copy | _Begin | _End
"""Blocks that start from the same rows; bytes to be moved; or what is left to the thread that looks after all."""

_Done = list[tuple[_Part, Kept]] | _Begin | _End
"""Blocks that were written, with what was kept of each; or what was left."""


def run(
    outputs: Sequence[Output], *, threads: int | None = None, on_bytes: OnBytes | None = None, one_at_a_time: bool = False
) -> list[dict[str, Finished]]:
    """Write the files of all `outputs`, which have the same base; they are on disk when this returns. Each output's files, by name.

    - `threads`: that compute, by default one a processor
    - `on_bytes`: called with the number of bytes after each write, and after each that was proven
    - `one_at_a_time`: prove a file when it is whole and before the next is written, for less memory

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written, and what a `check` raises; the folders are then not complete.
    """
    buffers = Buffers()
    closing = Closing(on_bytes or _ignore, trailing=not one_at_a_time)
    with ExitStack() as unless_done, closing, workers(threads) as pool:
        for output in outputs:
            _take_over(output, closing.on_bytes)
        turns = (_jobs(outputs, shards, unless_done, on_bytes) for shards in zip_longest(*(o.sources.plan.shards for o in outputs)))
        for jobs in turns if one_at_a_time else [chain.from_iterable(turns)]:
            for result in pool.results(partial(_work, buffers=buffers), jobs):
                closing.look()
                if isinstance(result, _Begin):
                    closing.begin(result.file)
                elif isinstance(result, _End):
                    closing.end(result.file)
                else:
                    for part, kept in result:
                        _count(part, kept)
            closing.wait()
        unless_done.pop_all()
    for output in outputs:
        _index(output)
    return [output.finished for output in outputs]


def _ignore(nbytes: int) -> None:
    pass


def _take_over(output: Output, on_bytes: OnBytes) -> None:
    """What stands there already; proven or hashed now, where that is wanted and was not done."""
    for name in (shard.name for shard in output.sources.plan.shards if shard.name in output.done):
        entry = output.done[name]
        kept = {tensor: Kept.of(numbers) for tensor, numbers in entry.kept.items()}
        if output.check is not None and not entry.proven:
            output.finish(name, output.check(name, on_bytes), kept, proven=True)
        elif output.hashed and not entry.sha256:
            output.finish(name, sha256_of(output.folder / name, error=CheckpointError), kept, proven=False)
        else:
            output.finished[name] = entry


def _work(job: _Job, buffers: Buffers) -> _Done:
    """Read the rows that the blocks start from, compute each, and write it."""
    if isinstance(job, _Begin | _End):
        return job
    if isinstance(job, _Copy):
        job.file.writer.copy_run(job.run, job.source)
        return []
    rows, passed = _passed(job)
    done = list(zip(job, passed, strict=True))
    if rows == job[0].block.count:
        return done
    job = tuple(part.after(rows) for part in job)
    base, taken = job[0].file.output.sources.start(job[0].block, buffers)
    for part in job:
        block, writer = part.block, part.file.writer
        room = buffers.take(block_bytes(block, block.step.dtype))
        merged, kept = compute(block, base, part.change(), part.file.output.sources.plan.options, room)
        writer.write(writer.tensors[block.step.tensor], block.offset * merged.element_size(), bytes_of(merged))
        buffers.give(room)
        done.append((part, kept))
    buffers.give(taken)
    return done


def _passed(job: tuple[_Part, ...]) -> tuple[int, list[Kept]]:
    """How many rows of the blocks, from the first on, are written already, and what they kept."""
    first, ways = job[0], []
    for part in job:
        block, writer = part.block, part.file.writer
        width = TORCH_DTYPES[block.step.dtype].itemsize
        place = writer.place(writer.tensors[block.step.tensor], block.offset * width, block.numel * width)
        ways.append(Way(block, part.change(), *place))
    rows, kept = pass_through(first.block, first.file.output.sources, ways)
    for part, way in zip(job, ways, strict=True):
        writer, row_bytes = part.file.writer, way.target.row_bytes
        writer.wrote(writer.tensors[part.block.step.tensor], part.block.start * row_bytes, rows * row_bytes)
    return rows, kept


def _count(part: _Part, kept: Kept) -> None:
    """Add what was kept of a block to that of its tensor."""
    step, file = part.block.step, part.file
    if step.action == "merge" or kept.clamped:
        file.kept[step.tensor] = file.kept.get(step.tensor, Kept()) + kept


def _index(output: Output) -> None:
    plan = output.sources.plan
    if needs_index(plan, output.sources.checkpoint):
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in specs_of(shard, output.sources.checkpoint))
        write_index(output.folder, weight_map, total, output.sources.checkpoint.index_name)


def _jobs(
    outputs: Sequence[Output], shards: Sequence[PlannedShard | None], unless_done: ExitStack, on_bytes: OnBytes | None
) -> Iterator[_Job]:
    """What is to be done for one file of each output; what is moved stands in between what is computed."""
    files = []
    for output, shard in zip(outputs, shards, strict=True):
        if shard is not None and shard.name not in output.finished:
            path, sources = output.folder / shard.name, output.sources
            head = head_of(shard, sources.plan, sources.checkpoint, path)
            writer = ShardWriter(path, (), on_bytes=on_bytes, head=head)
            unless_done.push(writer.__enter__().__exit__)
            files.append(OpenFile(output, shard, writer))
    yield from map(_Begin, files)
    moved = chain.from_iterable(map(_copies, files))
    for parts, copy in zip_longest(_parts(files), moved):
        if parts is not None:
            yield parts
        if copy is not None:
            yield copy
    yield from map(_End, files)


def _parts(files: Sequence[OpenFile]) -> Iterator[tuple[_Part, ...]]:
    """The blocks that are computed, those of several files together that start from the same rows of the base."""
    together: dict[object, list[tuple[OpenFile, Step]]] = {}
    for file in files:
        for step in file.shard.steps:
            if step.action != "copy":
                alone = (file, step.tensor) if step.replacement is not None else None
                together.setdefault((step.source, matrix_shape(step), alone), []).append((file, step))
    for group in together.values():
        changes = [Once(partial(file.output.sources.change, step)) for file, step in group]  # made with the first block
        for blocks in zip(*(blocks_of(step) for _, step in group), strict=True):
            yield tuple(_Part(file, block, change) for (file, _), block, change in zip(group, blocks, changes, strict=True))


def _copies(file: OpenFile) -> list[_Copy]:
    """The untouched tensors, as whole runs of bytes where they lie together on both sides, in the order of the file."""
    sources = file.output.sources
    by_source: dict[int, list[Step]] = {}
    for step in file.shard.steps:
        if step.action == "copy":
            by_source.setdefault(sources.base(step)[0].fileno(), []).append(step)
    copies = []
    for steps in by_source.values():
        source = sources.base(steps[0])[0]
        runs = file.writer.copy_runs([(file.writer.tensors[step.tensor], sources.base(step)[1]) for step in steps])
        copies += [_Copy(file, source, each) for each in runs]
    return sorted(copies, key=lambda copy: copy.run.start)  # the proof waits for the first that is missing

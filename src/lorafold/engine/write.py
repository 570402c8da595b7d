"""`run`: the outputs' files, written in order.

Threads read blocks, compute and write them, and move untouched bytes in between; others read back what is written and prove it,
close behind, and wait for the disk (`closing`). So reading, computing, writing, proving and the disk's own work go on at the same
time, across the ends of files too. Several outputs of one base are written side by side: a block of the base is read once for all
of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest

from ..checkpoints.index import write_index
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile
from ..files.safetensors.writer import CopyRun, ShardWriter
from ..kernel.stats import Kept
from ..planning.output_files import needs_index, specs_of
from ..planning.plan import PlannedShard, Step
from .blocks import matrix_shape, passes_of
from .file_heads import file_head
from .finish import Closing
from .outputs import OnBytes, Output
from .produce import OutputBlock, WritingSink, is_moved, produce
from .threads import Buffers, Once, workers


@dataclass(frozen=True, eq=False)
class _Copy:
    """Bytes to be moved as they are."""

    writer: ShardWriter
    source: TensorFile
    run: CopyRun


@dataclass(frozen=True, eq=False)
class _Begin:
    """A file of the output is open."""

    output: Output
    writer: ShardWriter


@dataclass(frozen=True, eq=False)
class _End:
    """Nothing more comes for it."""

    output: Output
    writer: ShardWriter


_Task = tuple[OutputBlock, ...] | _Copy | _Begin | _End
"""Blocks that start from the same rows; bytes to be moved; or what is left to the thread that looks after all."""

_Done = list[tuple[OutputBlock, Kept]] | _Begin | _End
"""Blocks that were written, with what was kept of each; or what was left."""


def run(
    outputs: Sequence[Output], *, threads: int | None = None, on_bytes: OnBytes | None = None, one_at_a_time: bool = False
) -> None:
    """Write the files of all `outputs`, which have the same base; they are on disk when this returns.

    - `threads`: that compute, by default one per CPU
    - `on_bytes`: called with the number of bytes after each write, and after each that was proven
    - `one_at_a_time`: prove a file when it is whole and before the next is written, for less memory

    Raises `NonFiniteError` where numbers overflow or were damaged, `CheckpointError` where a file cannot be read, `OutputError`
    where one cannot be written, and what `Output.prove` raises; the folders are then not complete.
    """
    buffers = Buffers()
    closing = Closing(on_bytes or _ignore, trailing=not one_at_a_time)
    with ExitStack() as unless_done, closing, workers(threads) as pool:
        for output in outputs:
            output.take_over(closing.on_bytes)
        turns = (_tasks(outputs, shards, unless_done, on_bytes) for shards in zip_longest(*(o.plan.shards for o in outputs)))
        for tasks in turns if one_at_a_time else [chain.from_iterable(turns)]:
            for result in pool.results(partial(_work, buffers=buffers), tasks):
                closing.look()
                if isinstance(result, _Begin):
                    closing.begin(result.output, result.writer)
                elif isinstance(result, _End):
                    closing.end(result.output, result.writer)
                else:
                    for part, kept in result:
                        part.count(kept)
            closing.wait()
        unless_done.pop_all()
    for output in outputs:
        _index(output)


def _ignore(nbytes: int) -> None:
    pass


def _work(task: _Task, buffers: Buffers) -> _Done:
    """Do what can be done by any thread."""
    if isinstance(task, _Begin | _End):
        return task
    if isinstance(task, _Copy):
        task.writer.copy_run(task.run, task.source)
        return []
    return produce(task, buffers)


def _index(output: Output) -> None:
    plan = output.plan
    if needs_index(plan, output.sources.checkpoint):
        weight_map = {step.tensor: shard.name for shard in plan.shards for step in shard.steps}
        total = sum(spec.nbytes or 0 for shard in plan.shards for spec in specs_of(shard, output.sources.checkpoint))
        write_index(output.folder, weight_map, total, output.sources.checkpoint.index_name)


def _tasks(
    outputs: Sequence[Output], shards: Sequence[PlannedShard | None], unless_done: ExitStack, on_bytes: OnBytes | None
) -> Iterator[_Task]:
    """What is to be done for one file of each output; what is moved stands in between what is computed."""
    files: list[tuple[Output, PlannedShard, ShardWriter]] = []
    for output, shard in zip(outputs, shards, strict=True):
        if shard is not None and shard.name not in output.finished:
            path, sources = output.folder / shard.name, output.sources
            head = file_head(shard, sources.plan, sources.checkpoint, path)
            writer = ShardWriter(path, (), on_bytes=on_bytes, head=(head.raw, head.tensors), file_size=head.file_size)
            unless_done.push(writer.__enter__().__exit__)
            files.append((output, shard, writer))
    yield from (_Begin(output, writer) for output, _, writer in files)
    moved = chain.from_iterable(_copies(*file) for file in files)
    for parts, copy in zip_longest(_blocks(files), moved):
        if parts is not None:
            yield parts
        if copy is not None:
            yield copy
    yield from (_End(output, writer) for output, _, writer in files)


def _blocks(files: Sequence[tuple[Output, PlannedShard, ShardWriter]]) -> Iterator[tuple[OutputBlock, ...]]:
    """The blocks that are made, those of several files together that start from the same rows of the base."""
    together: dict[object, list[tuple[Output, Step, ShardWriter]]] = {}
    for output, shard, writer in files:
        for step in shard.steps:
            if not is_moved(step, output.sources):
                alone = (writer, step.tensor) if step.replacement is not None or step.source is None else None
                together.setdefault((step.source, matrix_shape(step), alone), []).append((output, step, writer))
    for group in together.values():
        changes = [Once(partial(output.sources.change, step)) for output, step, _ in group]  # made with the first block
        sinks = [WritingSink(writer) for _, _, writer in group]
        for blocks in zip(*(passes_of(step) for _, step, _ in group), strict=True):
            yield tuple(
                OutputBlock(block, output.sources, change, sink, output.kept)
                for (output, _, _), block, change, sink in zip(group, blocks, changes, sinks, strict=True)
            )


def _copies(output: Output, shard: PlannedShard, writer: ShardWriter) -> list[_Copy]:
    """The untouched tensors, as whole runs of bytes where they lie together on both sides, in the order of the file."""
    by_source: dict[TensorFile, list[tuple[TensorInfo, TensorInfo]]] = {}
    for step in shard.steps:
        stored = output.sources.stored(step) if step.action == "copy" else None
        if stored is not None:
            by_source.setdefault(stored[0], []).append((writer.tensors[step.tensor], stored[1]))
    copies = [_Copy(writer, source, run) for source, pairs in by_source.items() for run in writer.copy_runs(pairs)]
    return sorted(copies, key=lambda copy: copy.run.start)  # the proof waits for the first that is missing

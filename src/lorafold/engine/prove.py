"""`prove`: every byte of the output read back and compared with what the plan says, computed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, Shard
from ..errors import NonFiniteError, printable
from ..files.digests import Algorithm, Digest, algorithm_of, new_digest, written
from ..files.gguf.gguf_header import blanked
from ..files.safetensors.buffers import same_bytes, tensor_over
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile, Until
from ..kernel.cpu.stream import FileRows
from ..kernel.stats import Kept
from ..planning.plan import Step
from .blocks import BLOCK_BYTES, Block, block_bytes, block_offset, passes_of
from .change import Change
from .produce import OutputBlock, is_moved, produce, rows_in
from .proof import Proof, ShardProof, TensorProof
from .sidecars import beside_failures
from .sources import Sources
from .threads import Buffers, Once, workers


def prove(
    output: Checkpoint,
    sources: Sources,
    *,
    hashes: Mapping[str, str] | None = None,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Proof:
    """What `output` holds against what the plan of `sources` says it must hold; nothing is taken from the run that wrote it.

    Merged tensors are recomputed and compared bit for bit, all others compared byte for byte with the base or the adapter; missing
    and extra tensors, shapes, dtypes, and what stands beside the weights are checked (`beside_failures`).

    - `hashes`: of its files, by name, as they are stated somewhere: the proof's are made in the same way

    Raises `CheckpointError` where a file cannot be read; what does not fit is in the proof.
    """
    buffers = Buffers()
    ways = {name: algorithm_of(stated) for name, stated in (hashes or {}).items()}
    shards = [
        prove_shard(shard, sources, ways.get(shard.name, "sha256"), buffers=buffers, threads=threads, on_bytes=on_bytes)
        for shard in output.shards
    ]
    return conclude(output, sources, shards)


def prove_shard(
    shard: Shard,
    sources: Sources,
    algorithm: Algorithm = "sha256",
    *,
    buffers: Buffers | None = None,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    until: Until | None = None,
) -> ShardProof:
    """What one file of the output holds against what the plan of `sources` says of its tensors.

    - `algorithm`: of the hash of the file
    - `until`: of a file that is still being written: waits for the bytes that are read next

    Raises `CheckpointError` where it cannot be read, and what `until` raises.
    """
    steps = {step.tensor: step for step in sources.plan.steps}
    tensors = {name: _form(info, steps.get(name), sources) for name, info in shard.header.tensors.items()}
    kept: dict[str, Kept] = {}
    nbytes = 0
    buffers = buffers or Buffers()
    digest = new_digest(algorithm)
    with TensorFile(shard.header, until=until) as file, workers(threads) as pool:
        digest.update(_head(file))
        end = shard.header.data_start
        for compared in pool.results(lambda run: _compare(run, file, sources, buffers), _runs(shard, steps, tensors, sources)):
            run, name = compared.run, compared.run.info.name
            start = run.info.start + run.offset
            if not _pad(file, end, start, digest):
                tensors[name] = TensorProof(tensors[name].action, False, "has other bytes than zeros before it")
            end = start + run.nbytes
            digest.update(memoryview(compared.found)[: run.nbytes])
            buffers.give(compared.found)
            nbytes += run.nbytes
            if compared.failure is not None and tensors[name].proven:
                tensors[name] = TensorProof(tensors[name].action, False, compared.failure)
            for share in compared.kept:
                if tensors[name].action in ("merge", "encode") or share.clamped:
                    kept[name] = kept.get(name, Kept()) + share
            if on_bytes is not None:
                on_bytes(run.nbytes)
        if not _pad(file, end, shard.header.file_size, digest):
            tensors["the end of the file"] = TensorProof("none", False, "has other bytes than zeros")
    return ShardProof(shard.name, tensors, written(algorithm, digest), nbytes, kept)


def conclude(output: Checkpoint, sources: Sources, shards: Sequence[ShardProof]) -> Proof:
    """The proof of the whole: of the files one by one, of what is missing, and of what stands beside the weights.

    Raises `CheckpointError` where a file of the base or of an adapter cannot be read.
    """
    tensors = {name: proof for shard in shards for name, proof in shard.tensors.items()}
    missing = {step.tensor: step for step in sources.plan.steps if step.tensor not in tensors}
    tensors |= {name: TensorProof(step.action, False, "is missing") for name, step in missing.items()}
    return Proof(
        tensors=tensors,
        files={shard.name: shard.digest for shard in shards},
        failures=(*_failures(tensors), *beside_failures(output, sources)),
        nbytes=sum(shard.nbytes for shard in shards),
        kept={name: kept for shard in shards for name, kept in shard.kept.items()},
    )


def _failures(tensors: Mapping[str, TensorProof]) -> list[str]:
    return [f"{printable(name)} {tensor.failure}" for name, tensor in tensors.items() if not tensor.proven]


@dataclass(frozen=True)
class _Run:
    """`nbytes` bytes at `offset` of a tensor of the output.

    - `step`: what makes the tensor; None of one whose bytes are only hashed
    - `block`: which block of it they are; None of bytes that are compared with the base's as they are
    - `change`: what is done to the rows that the block starts from
    """

    info: TensorInfo
    offset: int
    nbytes: int
    step: Step | None
    block: Block | None = None
    change: Once[Change] | None = None


@dataclass(frozen=True)
class _Compared:
    """A run, its bytes in the output, what is wrong with them, and what they kept of an update."""

    run: _Run
    found: bytearray  # the first nbytes of it
    failure: str | None = None
    kept: tuple[Kept, ...] = ()


class _ComparingSink:
    """The sink that compares a block with the bytes of `run` in `file`, which are read into `found`.

    - `failure`: what is wrong with them
    """

    def __init__(self, run: _Run, file: TensorFile, found: bytearray) -> None:
        self.failure: str | None = None
        self._run = run
        self._file = file
        self._found = memoryview(found)[: run.nbytes]
        self._done = 0  # bytes that are read and compared

    def rows(self, block: Block) -> FileRows:
        """Where in the file the block lies, when it is there."""
        start, nbytes = self._run.info.start + self._run.offset + self._done, block_bytes(block, block.step.dtype)
        self._file.wait(start + nbytes)
        room = tensor_over(self._found[self._done :], torch.uint8, (nbytes,))
        return rows_in(block, self._file.fileno(), start, room)

    def passed(self, block: Block, rows: int) -> None:
        """They are read, and are the same."""
        self._done += block_bytes(block, block.step.dtype) // block.count * rows

    def put(self, block: Block, made: Tensor) -> None:
        """Read what follows, and compare it."""
        expected = made.view(-1).view(torch.uint8)
        rest = self.read(expected.numel())
        if rest:
            found = tensor_over(rest, torch.uint8, (len(rest),))
            if self.failure is None and not same_bytes(found, expected):
                self.failure = _difference(self._run, self._done, found, expected)
        self._done += len(rest)

    def read(self, nbytes: int | None = None) -> memoryview:
        """What was not compared yet: its first `nbytes`, or all."""
        rest = self._found[self._done :][:nbytes]
        self._file.read_into(self._run.info.start + self._run.offset + self._done, rest)
        return rest


def _form(info: TensorInfo, step: Step | None, sources: Sources) -> TensorProof:
    """What a tensor's name, dtype, shape and size prove by themselves; proven so far."""
    if step is None:
        return TensorProof("none", False, "is not in the plan")
    if step.action == "copy" and info.nbytes != (size := sources.origin(step).nbytes):
        return TensorProof(step.action, False, f"has {info.nbytes} bytes, expected {size}")
    if (info.dtype, info.shape) != (step.dtype, step.shape):
        found, expected = f"{list(info.shape)} of {printable(info.dtype)}", f"{list(step.shape)} of {step.dtype}"
        return TensorProof(step.action, False, f"is {found}, expected {expected}")
    return TensorProof(step.action, True)


def _runs(shard: Shard, steps: dict[str, Step], tensors: dict[str, TensorProof], sources: Sources) -> Iterator[_Run]:
    """All bytes of a file's tensors, in order."""
    for info in shard.header.tensors.values():
        step = steps[info.name] if tensors[info.name].proven else None
        if step is None or is_moved(step, sources):
            for offset in range(0, info.nbytes, BLOCK_BYTES):
                yield _Run(info, offset, min(BLOCK_BYTES, info.nbytes - offset), step)
            continue
        change = Once(partial(sources.change, step))
        for block in passes_of(step):
            yield _Run(info, block_offset(block), block_bytes(block, step.dtype), step, block, change)


def _compare(run: _Run, file: TensorFile, sources: Sources, buffers: Buffers) -> _Compared:
    found = buffers.take(run.nbytes)
    sink = _ComparingSink(run, file, found)
    if run.block is None or run.change is None or not run.nbytes:  # the last of an empty tensor
        return _Compared(run, found, _unmoved(run, sink.read(), sources, buffers))
    part = OutputBlock(run.block, sources, run.change, sink, {})
    try:
        shares = [kept for _, kept in produce([part], buffers)]
    except NonFiniteError as error:
        sink.read()
        return _Compared(run, found, f"cannot be recomputed: {error.message}")
    return _Compared(run, found, sink.failure, tuple(shares))


def _unmoved(run: _Run, rest: memoryview, sources: Sources, buffers: Buffers) -> str | None:
    """What is wrong with the bytes `rest` of `run`, which are to be the base's as they are; None where nothing is."""
    stored = None if run.step is None or not run.nbytes else sources.stored(run.step)
    if stored is None:
        return None
    file, info = stored
    room = buffers.take(run.nbytes)
    file.read_into(info.start + run.offset, memoryview(room)[: run.nbytes])
    found, expected = (tensor_over(each, torch.uint8, (run.nbytes,)) for each in (rest, room))
    failure = None if same_bytes(found, expected) else _difference(run, 0, found, expected)
    buffers.give(room)
    return failure


def _difference(run: _Run, done: int, found: Tensor, expected: Tensor) -> str:
    """How they differ, which follow the first `done` bytes of the run."""
    width = max(1, run.info.nbytes // max(1, run.info.numel))
    width = width if run.nbytes % width == 0 else 1  # of a type that nobody knows
    differing = (found != expected).view(-1, width).any(dim=1).nonzero()
    first = _index((run.offset + done) // width + int(differing[0]), run.info)
    return f"differs in {len(differing)} of {run.nbytes // width} elements of a block, the first at {first}"


def _index(flat: int, info: TensorInfo) -> list[int]:
    index = []
    for size in reversed(info.shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return index[::-1]


def _head(file: TensorFile) -> memoryview:
    head = memoryview(bytearray(file.header.data_start))
    file.read_into(0, head)
    blanked(file.header, 0, head)
    return head


def _pad(file: TensorFile, start: int, stop: int, digest: Digest) -> bool:
    """Whether the bytes `start` to `stop` of `file`, which are of no tensor, are zeros; `digest` is told of them."""
    zeros = True
    for first in range(start, stop, BLOCK_BYTES):
        found = memoryview(bytearray(min(BLOCK_BYTES, stop - first)))
        file.read_into(first, found)
        digest.update(found)
        zeros = zeros and not any(found)
    return zeros

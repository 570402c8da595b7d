"""`prove`: every byte of the output read back and compared with what the plan says, computed anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint, Shard
from ..errors import NonFiniteError, printable
from ..files.safetensors.buffers import same_bytes, tensor_over
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile, Until
from ..kernel.stats import Kept
from ..planning.plan import Step
from .blocks import BLOCK_BYTES, Block, block_bytes, blocks_of, compute
from .change import Change
from .proof import Proof, ShardProof, TensorProof
from .sidecars import beside_failures
from .sources import Sources
from .stream import Way, pass_through
from .threads import Buffers, Once, workers


def prove(
    output: Checkpoint, sources: Sources, *, threads: int | None = None, on_bytes: Callable[[int], None] | None = None
) -> Proof:
    """What `output` holds against what the plan of `sources` says it must hold; nothing is taken from the run that wrote it.

    Merged tensors are recomputed and compared bit for bit, all others compared byte for byte with the base or the adapter; missing
    and extra tensors, shapes, dtypes, and what stands beside the weights are checked (`beside_failures`).

    Raises `CheckpointError` where a file cannot be read; what does not fit is in the proof.
    """
    buffers = Buffers()
    shards = [prove_shard(shard, sources, buffers=buffers, threads=threads, on_bytes=on_bytes) for shard in output.shards]
    return conclude(output, sources, shards)


def prove_shard(
    shard: Shard,
    sources: Sources,
    *,
    buffers: Buffers | None = None,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
    until: Until | None = None,
) -> ShardProof:
    """What one file of the output holds against what the plan of `sources` says of its tensors.

    - `until`: of a file that is still being written: waits for the bytes that are read next

    Raises `CheckpointError` where it cannot be read, and what `until` raises.
    """
    steps = {step.tensor: step for step in sources.plan.steps}
    tensors = {name: _form(info, steps.get(name), sources) for name, info in shard.header.tensors.items()}
    kept: dict[str, Kept] = {}
    nbytes = 0
    buffers = buffers or Buffers()
    digest = hashlib.sha256()
    with TensorFile(shard.header, until=until) as file, workers(threads) as pool:
        digest.update(_head(file))
        for compared in pool.results(
            lambda piece: _compare(piece, file, sources, buffers), _pieces(shard, steps, tensors, sources)
        ):
            piece, name = compared.piece, compared.piece.info.name
            digest.update(memoryview(compared.found)[: piece.nbytes])
            buffers.give(compared.found)
            nbytes += piece.nbytes
            if compared.failure is not None and tensors[name].proven:
                tensors[name] = TensorProof(tensors[name].action, False, compared.failure)
            if (piece.step is not None and piece.step.action == "merge") or compared.kept.clamped:
                kept[name] = kept.get(name, Kept()) + compared.kept
            if on_bytes is not None:
                on_bytes(piece.nbytes)
    return ShardProof(shard.name, tensors, digest.hexdigest(), nbytes, kept)


def conclude(output: Checkpoint, sources: Sources, shards: Sequence[ShardProof]) -> Proof:
    """The proof of the whole: of the files one by one, of what is missing, and of what stands beside the weights.

    Raises `CheckpointError` where a file of the base or of an adapter cannot be read.
    """
    tensors = {name: proof for shard in shards for name, proof in shard.tensors.items()}
    missing = {step.tensor: step for step in sources.plan.steps if step.tensor not in tensors}
    tensors |= {name: TensorProof(step.action, False, "is missing") for name, step in missing.items()}
    return Proof(
        tensors=tensors,
        files={shard.name: shard.sha256 for shard in shards},
        failures=(*_failures(tensors), *beside_failures(output, sources)),
        nbytes=sum(shard.nbytes for shard in shards),
        kept={name: kept for shard in shards for name, kept in shard.kept.items()},
    )


def _failures(tensors: Mapping[str, TensorProof]) -> list[str]:
    return [f"{printable(name)} {tensor.failure}" for name, tensor in tensors.items() if not tensor.proven]


NOTHING = Once(lambda: Change(()))
"""The change of bytes that are copied."""


@dataclass(frozen=True)
class _Piece:
    """`nbytes` bytes at `offset` of a tensor of the output: a block of the step that makes it, or a run of bytes.

    `block` is None for bytes that are compared with the base's as they are, or, without a step, only hashed.
    """

    info: TensorInfo
    offset: int
    nbytes: int
    step: Step | None
    block: Block | None = None
    change: Once[Change] = NOTHING


@dataclass(frozen=True)
class _Compared:
    """A piece, its bytes in the output, and what is wrong with them."""

    piece: _Piece
    found: bytearray  # the first nbytes of it
    failure: str | None
    kept: Kept = Kept()  # noqa: RUF009 - frozen


def _form(info: TensorInfo, step: Step | None, sources: Sources) -> TensorProof:
    """What a tensor's name, dtype, shape and size prove by themselves; proven so far."""
    if step is None:
        return TensorProof("none", False, "is not in the plan")
    if step.action == "copy" and info.nbytes != (size := sources.base(step)[1].nbytes):
        return TensorProof(step.action, False, f"has {info.nbytes} bytes, expected {size}")
    if (info.dtype, info.shape) != (step.dtype, step.shape):
        found, expected = f"{list(info.shape)} of {printable(info.dtype)}", f"{list(step.shape)} of {step.dtype}"
        return TensorProof(step.action, False, f"is {found}, expected {expected}")
    return TensorProof(step.action, True)


def _pieces(shard: Shard, steps: dict[str, Step], tensors: dict[str, TensorProof], sources: Sources) -> Iterator[_Piece]:
    """All bytes of a file's tensors, in order."""
    for info in shard.header.tensors.values():
        step = steps[info.name] if tensors[info.name].proven else None
        if step is None or step.action == "copy":
            for offset in range(0, info.nbytes, BLOCK_BYTES):
                yield _Piece(info, offset, min(BLOCK_BYTES, info.nbytes - offset), step)
            continue
        change = Once(partial(sources.change, step))
        for block in blocks_of(step):
            yield _Piece(
                info, block.offset * info.nbytes // max(1, info.numel), block_bytes(block, step.dtype), step, block, change
            )


def _compare(piece: _Piece, file: TensorFile, sources: Sources, buffers: Buffers) -> _Compared:
    buffer = buffers.take(piece.nbytes)
    done, kept = 0, Kept()
    if piece.block is not None and piece.nbytes:  # not of an empty tensor
        start = piece.info.start + piece.offset
        file.wait(start + piece.nbytes)
        way = Way(piece.block, piece.change(), file.fileno(), start, buffer)
        rows, (kept,) = pass_through(piece.block, sources, [way])
        done = piece.nbytes // piece.block.count * rows
    rest = memoryview(buffer)[done : piece.nbytes]
    file.read_into(piece.info.start + piece.offset + done, rest)
    if piece.step is None or not rest:
        return _Compared(piece, buffer, None, kept)
    room = buffers.take(len(rest))
    found = tensor_over(rest, torch.uint8, (len(rest),))
    try:
        expected, kept_of_rest = _expected(piece, done, piece.step, sources, buffers, room)
        kept += kept_of_rest
        failure = None if same_bytes(found, expected) else _difference(piece, done, found, expected)
    except NonFiniteError as error:
        failure = f"cannot be recomputed: {error.message}"
    buffers.give(room)
    return _Compared(piece, buffer, failure, kept)


def _expected(piece: _Piece, done: int, step: Step, sources: Sources, buffers: Buffers, room: bytearray) -> tuple[Tensor, Kept]:
    """(nbytes - done,) uint8, in `room`: what the piece must hold after `done` bytes, and what of an update that keeps."""
    if piece.block is not None:
        block = piece.block.after(done * piece.block.count // piece.nbytes) if done else piece.block
        base, taken = sources.start(block, buffers)
        merged, kept = compute(block, base, piece.change(), sources.plan.options, room)
        buffers.give(taken)
        return merged.view(-1).view(torch.uint8), kept
    source, info = sources.base(step)
    source.read_into(info.start + piece.offset, memoryview(room)[: piece.nbytes])
    return tensor_over(room, torch.uint8, (piece.nbytes,)), Kept()


def _difference(piece: _Piece, done: int, found: Tensor, expected: Tensor) -> str:
    """How they differ, which follow the first `done` bytes of the piece."""
    width = max(1, piece.info.nbytes // max(1, piece.info.numel))
    width = width if piece.nbytes % width == 0 else 1  # of a type that nobody knows
    differing = (found != expected).view(-1, width).any(dim=1).nonzero()
    first = _index((piece.offset + done) // width + int(differing[0]), piece.info)
    return f"differs in {len(differing)} of {piece.nbytes // width} elements of a block, the first at {first}"


def _index(flat: int, info: TensorInfo) -> list[int]:
    index = []
    for size in reversed(info.shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return index[::-1]


def _head(file: TensorFile) -> memoryview:
    head = memoryview(bytearray(file.header.data_start))
    file.read_into(0, head)
    return head

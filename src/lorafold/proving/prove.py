"""`prove`: every byte of the output read back and compared with what the plan says, computed anew."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Shard
from ..errors import NonFiniteError, printable
from ..planning import Step
from ..steps import BLOCK_BYTES, Block, Sources, blocks_of, compute, edited
from ..tensorfile import PT_METADATA, TensorFile, TensorInfo, bytes_of
from ..update import LowRankUpdate
from .proof import Proof, TensorProof


def prove(output: Checkpoint, sources: Sources, *, on_bytes: Callable[[int], None] | None = None) -> Proof:
    """What `output` holds against what the plan of `sources` says it must hold; nothing is taken from the run that wrote it.

    Merged tensors are recomputed and compared bit for bit, all others compared byte for byte with the base or the adapter; missing
    and extra tensors, shapes, dtypes, the files' metadata and the changed fields of config.json are checked.

    Raises `CheckpointError` where a file cannot be read; what does not fit is in the proof.
    """
    steps = {step.tensor: step for step in sources.plan.steps}
    found = _Found()
    for shard in output.shards:
        _prove_shard(shard, steps, sources, found, on_bytes)
    for name in steps.keys() - output.tensors.keys():
        found.fail(name, steps[name].action, "is missing")
    found.other += _config_failures(output, sources)
    failures = [f"{printable(name)} {tensor.failure}" for name, tensor in found.tensors.items() if not tensor.proven]
    return Proof(found.tensors, found.files, (*failures, *found.other), found.nbytes)


@dataclass
class _Found:
    """What has been found so far."""

    tensors: dict[str, TensorProof] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)
    nbytes: int = 0

    def fail(self, name: str, action: str, failure: str) -> None:
        self.tensors[name] = TensorProof(action, False, failure)


@dataclass(frozen=True)
class _Piece:
    """Bytes of an output tensor and where they come from: a block of a step, or a run of copied bytes at `offset`."""

    info: TensorInfo
    block: Block
    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Read:
    """A piece, its bytes in the output, and what they are computed from."""

    piece: _Piece
    found: Tensor  # (nbytes,) uint8
    base: Tensor
    updates: tuple[LowRankUpdate, ...]


def _prove_shard(
    shard: Shard, steps: dict[str, Step], sources: Sources, found: _Found, on_bytes: Callable[[int], None] | None
) -> None:
    if dict(shard.header.metadata) != dict(PT_METADATA):
        found.other.append(
            f"{printable(shard.name)} has the metadata {dict(shard.header.metadata)!r}, expected {dict(PT_METADATA)!r}"
        )
    digest = hashlib.sha256()
    with (
        TensorFile(shard.header) as file,
        ThreadPoolExecutor(1, "read") as reading,
        ThreadPoolExecutor(1, "hash") as hashing,
    ):
        head = memoryview(bytearray(shard.header.data_start))
        file.read_into(0, head)
        digest.update(head)
        hashed: Future[None] | None = None
        for read in _ahead(reading, file, shard, steps, sources, found):
            if hashed is not None:
                hashed.result()
            hashed = hashing.submit(digest.update, bytes_of(read.found))
            _compare(read, sources, found)
            found.nbytes += read.piece.nbytes
            if on_bytes is not None:
                on_bytes(read.piece.nbytes)
        if hashed is not None:
            hashed.result()
    found.files[shard.name] = digest.hexdigest()


def _ahead(
    reading: ThreadPoolExecutor, file: TensorFile, shard: Shard, steps: dict[str, Step], sources: Sources, found: _Found
) -> Iterator[_Read]:
    """The pieces of a file in the order of its bytes, all of them, each read while the one before is compared."""
    waiting: Future[_Read] | None = None
    updates: tuple[LowRankUpdate, ...] = ()
    for info in shard.header.tensors.values():
        step = steps.get(info.name)
        if step is None:
            found.fail(info.name, "none", "is not in the plan")
        elif (info.dtype, info.shape) != (step.dtype, step.shape):
            shown = f"is {list(info.shape)} of {printable(info.dtype)}, expected {list(step.shape)} of {step.dtype}"
            found.fail(info.name, step.action, shown)
            step = None
        else:
            found.tensors[info.name] = TensorProof(step.action, True)
        for piece in _pieces(info, step):
            if step is not None and piece.block.start == 0:
                updates = sources.updates(step)
            following = reading.submit(_read, piece, updates, file, sources, step is not None)
            if waiting is not None:
                yield waiting.result()
            waiting = following
    if waiting is not None:
        yield waiting.result()


def _pieces(info: TensorInfo, step: Step | None) -> Iterator[_Piece]:
    if step is None or step.action == "copy":
        stand_in = step or Step(info.name, "copy", info.dtype, info.shape)
        for offset in range(0, info.nbytes, BLOCK_BYTES):
            yield _Piece(info, Block(stand_in, 0, 0), offset, min(BLOCK_BYTES, info.nbytes - offset))
        return
    rows = info.shape[0] if info.shape else 1
    for block in blocks_of(step):
        yield _Piece(info, block, block.start * info.nbytes // rows, block.count * info.nbytes // rows)


def _read(piece: _Piece, updates: tuple[LowRankUpdate, ...], file: TensorFile, sources: Sources, comparable: bool) -> _Read:
    found = torch.empty(piece.nbytes, dtype=torch.uint8)
    file.read_into(piece.info.start + piece.offset, bytes_of(found))
    step, block = piece.block.step, piece.block
    if not comparable:
        return _Read(piece, found, found, ())
    if step.action == "copy":
        source, info = sources.base(step)
        base = torch.empty(piece.nbytes, dtype=torch.uint8)
        source.read_into(info.start + piece.offset, bytes_of(base))
    elif step.action == "replace":
        reader, info = sources.replacement(step)
        base = reader.rows(info, block.start, block.count)
    else:
        source, info = sources.base(step)
        base = source.read_rows(info, block.start, block.count)
    return _Read(piece, found, base, updates)


def _compare(read: _Read, sources: Sources, found: _Found) -> None:
    piece = read.piece
    step = piece.block.step
    if not found.tensors[piece.info.name].proven:
        return
    if step.action == "copy":
        expected = read.base
    else:
        try:
            merged, _ = compute(piece.block, read.base, read.updates, sources.plan.options)
        except NonFiniteError as error:
            found.fail(piece.info.name, step.action, f"cannot be recomputed: {error.message}")
            return
        expected = merged.contiguous().view(-1).view(torch.uint8)
    if _same_bytes(read.found, expected):
        return
    width = piece.info.nbytes // max(1, piece.info.numel)
    differing = (read.found != expected).view(-1, max(1, width)).any(dim=1).nonzero()
    first = piece.offset // max(1, width) + int(differing[0])
    elements = piece.nbytes // max(1, width)
    shown = f"differs in {len(differing)} of {elements} elements of a block, the first at {_index(first, piece.info)}"
    found.fail(piece.info.name, step.action, shown)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.numel() % 8 == 0:
        one, other = one.view(torch.int64), other.view(torch.int64)
    return torch.equal(one, other)


def _index(flat: int, info: TensorInfo) -> list[int]:
    index = []
    for size in reversed(info.shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return index[::-1]


def _config_failures(output: Checkpoint, sources: Sources) -> list[str]:
    base = sources.checkpoint.config
    expected: dict[str, Any] | None = None if base is None else edited(base, sources.plan.config)
    if output.config == expected or repr(output.config) == repr(expected):  # repr: NaN is not equal to itself
        return []
    fields = sorted(
        name
        for name in {**(expected or {}), **(output.config or {})}
        if (expected or {}).get(name) != (output.config or {}).get(name)
    )
    return [f"config.json differs from what it must be in {', '.join(printable(name) for name in fields) or 'being there'}"]

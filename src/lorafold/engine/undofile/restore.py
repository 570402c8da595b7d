"""Writing the base again from a merged checkpoint and its undo file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path

from ...checkpoints.checkpoint import Checkpoint
from ...errors import CheckpointError, VerificationError, printable
from ...files import strictjson
from ...files.atomic.checks import output_fault
from ...files.atomic.durable import copy_file
from ...files.gguf.gguf_header import read_gguf_header
from ...files.regular import sha256_of
from ...files.safetensors.buffers import bytes_of
from ...files.safetensors.header import read_header
from ...files.safetensors.info import TensorInfo
from ...files.safetensors.reader import TensorFile
from ...files.safetensors.writer import ShardWriter
from ..threads import Workers, workers
from .base_heads import BaseHead, head_from
from .changed import Span, read_tile
from .read import Place, UndoFile, opened

_BLOCK = 1 << 22

Heads = dict[str, BaseHead]
"""By name of a file of weights, its beginning."""


def restore(
    undo: UndoFile,
    output: Checkpoint,
    folder: Path,
    *,
    changed: Collection[str],
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Write the base that `output` was made of into `folder`; the bytes of its tensors.

    `changed`: the tensors that merging changed, as the receipt of `output` has them.

    Every tensor is read back: one that merging changed must have the hash that the undo file has of the base's, one that it did
    not change the bytes that `output` has.

    Raises `VerificationError` where something does not come out, `OutputError` where it cannot be written.
    """
    heads: Heads = {name: _parsed(undo, name) for name in undo.description.shards}
    _check(undo, output, heads, changed)
    total = 0
    with opened(output) as files, workers(threads) as pool:
        for name, head in heads.items():
            start, infos = (head.raw, head.tensors), head.tensors
            with ShardWriter(folder / name, (), on_bytes=on_bytes, head=start, file_size=head.file_size) as writer:
                for info in infos:
                    if info.name in undo.description.tensors:
                        _restore(writer, info, undo, files.get(info.name), pool)
                    else:
                        writer.copy(info, *files[info.name])
            _read_back(folder / name, infos, undo, files)
            total += sum(info.nbytes for info in infos)
    for name, each in undo.description.files.items():
        target = folder / name
        if each.stored:
            _write(undo, name, target)
        else:
            copy_file(output.root / name, target)
        if sha256_of(target, error=CheckpointError) != each.sha256:
            raise VerificationError(f"{printable(name)} does not come out as the base had it", hint="nothing was written")
    return total


def base_size(undo: UndoFile) -> int:
    """Bytes of the base's files of weights, as their headers say.

    Raises `VerificationError` where the headers are damaged.
    """
    return sum(_parsed(undo, name).file_size for name in undo.description.shards)


def _parsed(undo: UndoFile, shard: str) -> BaseHead:
    try:
        return head_from(undo.head(shard), Path(shard))
    except CheckpointError as error:
        raise undo.damaged(f"the header of {printable(shard)} in it: {error.message}") from error


def _check(undo: UndoFile, output: Checkpoint, heads: Heads, changed: Collection[str]) -> None:
    """That the headers are those of the base, by its fingerprint, and that every tensor of them is in `output`."""
    files = [[name, head.file_size, head.sha256] for name, head in heads.items()]
    if hashlib.sha256(strictjson.canonical(files).encode()).hexdigest() != undo.description.fingerprint:
        raise undo.damaged("the headers in it do not have the base's fingerprint")
    base = {info.name: info for head in heads.values() for info in head.tensors}
    stored = output.stored
    for name, info in base.items():
        if name in changed and name not in undo.description.tensors:
            raise undo.damaged(f"it has nothing of '{printable(name)}', which merging changed")
        found = stored.get(name)
        if name in undo.description.tensors:
            continue
        if found is None:
            raise undo.damaged(f"the merged checkpoint has no '{printable(name)}'")
        if found.nbytes != info.nbytes:
            raise undo.damaged(f"'{printable(name)}' has {info.nbytes} bytes in the base, {found.nbytes} in the merged checkpoint")
    unknown = [name for name in undo.description.tensors if name not in base]
    if unknown:
        raise undo.damaged(f"the base has no '{printable(unknown[0])}'")


def _restore(writer: ShardWriter, info: TensorInfo, undo: UndoFile, place: Place | None, pool: Workers) -> None:
    tensor = undo.tensor(info)
    row = tensor.base.nbytes // max(1, tensor.base.numel) * tensor.columns

    def work(span: Span) -> None:
        merged = None
        if tensor.needs_merged(span):
            if place is None:
                raise undo.damaged(f"the merged checkpoint has no '{printable(info.name)}'")
            merged_file, merged_info = place
            if (
                span.stop * tensor.columns > merged_info.numel
                or merged_info.torch_dtype is None
                or not (merged_info.torch_dtype.is_floating_point or merged_info.dtype == info.dtype)
            ):
                raise undo.damaged(f"'{printable(info.name)}' is another tensor in the merged checkpoint")
            merged = read_tile(merged_file, merged_info, span, tensor.columns)
        writer.write(info, span.start * row, bytes_of(tensor.restore(span, merged)))

    for _ in pool.results(work, tensor.spans):
        pass


def _read_back(path: Path, infos: tuple[TensorInfo, ...], undo: UndoFile, files: dict[str, Place]) -> None:
    read = read_gguf_header if path.suffix == ".gguf" else read_header
    with TensorFile(read(path)) as file:
        for info in infos:
            changed = undo.description.tensors.get(info.name)
            digest, same = hashlib.sha256(), True
            for offset in range(0, info.nbytes, _BLOCK):
                size = min(_BLOCK, info.nbytes - offset)
                found = bytearray(size)
                file.read_into(info.start + offset, memoryview(found))
                if changed is not None:
                    digest.update(found)
                    continue
                wanted = bytearray(size)
                source, source_info = files[info.name]
                source.read_into(source_info.start + offset, memoryview(wanted))
                same = same and found == wanted
            if not same or (changed is not None and digest.hexdigest() != changed.sha256):
                raise VerificationError(
                    f"'{printable(info.name)}' does not come out with the bytes that it had before merging",
                    hint="nothing was written; use `base=BASE` if you have it",
                )


def _write(undo: UndoFile, name: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            for part in undo.stored(name):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise output_fault(cause, target) from cause

"""The base of one merged checkpoint, put into a folder: from the base itself, held to the receipt, or from an undo file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ..checkpoints.checkpoint import BaseReader, Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.receipt import RECEIPT_NAME, Receipt, receipt_bytes, receipt_damage
from ..checkpoints.sidecar_files import files_beside_weights
from ..engine.undofile.read import UndoFile
from ..engine.undofile.restore import base_size, restore
from ..errors import CheckpointError, InputError, OutputError, VerificationError, printable
from ..files.atomic.checks import require_space
from ..files.atomic.durable import copy_proven
from ..files.digests import algorithm_of, hash_of, shown_hash
from ..files.expression import Matrix
from ..files.gguf.gguf_header import blank_of
from ..files.progress import Progress
from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.info import TensorInfo
from ..planning.make import fingerprint
from .verifying import open_merged

_BLOCK = 1 << 22


def restorable(out: Path) -> tuple[Checkpoint, Receipt]:
    """The merged checkpoint at `out` and its receipt. Raises `InputError` where it is an overlay, and as `open_merged` does."""
    output, receipt = open_merged(out)
    if receipt.options.only_changed:
        raise nothing_to_restore(out)
    return output, receipt


def nothing_to_restore(out: Path) -> InputError:
    """The error for an overlay."""
    return InputError(
        f"{printable(str(out))} holds only the tensors that a merge changed; the base is where it was, and as it was",
        hint="there is nothing to restore",
    )


def from_base(out: Path, base: Path, folder: Path, progress: Progress, *, one_file: bool = False) -> int:
    """Copy `base`, which must be what `out` was merged from, into `folder`; the bytes of its tensors. `one_file`: it must be one.

    Raises `CheckpointError` where it is another one, `VerificationError` where `out` is damaged.
    """
    output, receipt = restorable(out)
    checkpoint = open_checkpoint(base, prefer="index", repair_index=True)
    if damage := receipt_damage(out, unsealed=True):  # an undo file has a hash of it
        raise VerificationError(f"{printable(str(out))} is not as it was written", failures=damage, hint="nothing was written")
    _check_base(checkpoint, output, receipt)
    if one_file and len(checkpoint.shards) > 1:
        raise OutputError(
            f"{printable(str(base))} cannot be written to one file: the base is {len(checkpoint.shards)} files",
            hint="nothing was written; give the path of a folder",
        )
    require_space(folder, checkpoint.nbytes)
    with progress.phase("compare", checkpoint.nbytes) as advance:
        _check_untouched(checkpoint, output, receipt, advance)
    with progress.phase("restore", checkpoint.nbytes) as advance:
        weights = ((shard.name, shard.path) for shard in checkpoint.shards)
        for name, source in (*weights, *files_beside_weights(checkpoint)):
            copy_proven(source, folder / name)
            advance(source.stat().st_size)
    return checkpoint.nbytes


def from_undo(out: Path, path: Path, folder: Path, progress: Progress) -> int:
    """Write what `out` was merged from into `folder`, by the undo file at `path`; the bytes of its tensors.

    Raises `VerificationError` where one of them is damaged, or they do not belong together.
    """
    output, receipt = restorable(out)
    with UndoFile(path) as undo:
        found = hashlib.sha256(receipt_bytes(output.place) or b"").hexdigest()
        if undo.description.receipt != found:
            raise VerificationError(
                f"{printable(str(path))} is not the undo file of {printable(str(output.root))}: expected a merge whose"
                f" {RECEIPT_NAME} has sha256 {found}, found {undo.description.receipt}",
                hint="nothing was written; give the file of the merge with `undo=FILE` that made it",
            )
        with progress.phase("compare", output.nbytes) as advance:
            _check_written(output, undo.description.output, advance)
        size = base_size(undo)
        require_space(folder, size)
        with progress.phase("restore", size) as advance:
            return restore(undo, output, folder, changed=receipt.tensors.keys(), on_bytes=advance)


def _check_written(output: Checkpoint, files: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """The files of weights of a merged checkpoint have the hashes that they were written with."""
    failures = [f"{printable(name)} is missing" for name in files.keys() - {shard.name for shard in output.shards}]
    for shard in output.shards:
        stated = files.get(shard.name, "")
        found = hash_of(shard.path, algorithm_of(stated), error=CheckpointError, blank=blank_of(shard.header))
        if found != stated:
            failures.append(f"{printable(shard.name)} has {shown_hash(found)}, expected {printable(stated) or 'no such file'}")
        advance(shard.header.file_size)
    if failures:
        raise VerificationError(
            f"{printable(str(output.root))} is not as it was written", failures=failures, hint="nothing was written"
        )


def _check_base(checkpoint: Checkpoint, output: Checkpoint, receipt: Receipt) -> None:
    found = fingerprint(checkpoint)
    if found != receipt.base.get("fingerprint"):
        raise CheckpointError(
            f"{printable(str(checkpoint.root))} is not the base of {printable(str(output.root))}: expected fingerprint"
            f" {printable(str(receipt.base.get('fingerprint')))} ({printable(str(receipt.base.get('name')))}), found {found}",
            hint="nothing was written; give the base that it was merged into",
        )


def _check_untouched(checkpoint: Checkpoint, output: Checkpoint, receipt: Receipt, advance: Callable[[int], None]) -> None:
    """Every tensor that merging left alone has the same bytes in both."""
    stored = output.stored
    with BaseReader(checkpoint) as base, BaseReader(output) as merged:
        for name, tensor in checkpoint.as_stored.items():
            if name not in receipt.tensors and name in stored and not _same(base, tensor, merged, stored[name]):
                raise CheckpointError(
                    f"{printable(str(checkpoint.root))} is not the base of {printable(str(output.root))}: tensor"
                    f" '{printable(name)}', which merging did not change, differs",
                    hint="nothing was written; give the base that it was merged into",
                )
            advance(tensor.nbytes)


def _same(base: BaseReader, tensor: Matrix, merged: BaseReader, info: TensorInfo) -> bool:
    """Whether the tensor `info` of the merged checkpoint has the bytes of the base's `tensor`."""
    if tensor.nbytes != info.nbytes:
        return False
    if not isinstance(tensor, TensorInfo):
        rows = tensor.shape[0] if tensor.shape else 1
        each = max(1, _BLOCK * rows // max(1, tensor.nbytes))
        wanted = (base.rows(tensor, start, min(each, rows - start)) for start in range(0, rows, each))
        return all(
            bytes_of(part) == bytes_of(merged.rows(info, start, part.shape[0]))
            for start, part in zip(range(0, rows, each), wanted, strict=True)
        )
    left, right = base.file(tensor), merged.file(info)
    one, two = bytearray(min(_BLOCK, info.nbytes)), bytearray(min(_BLOCK, info.nbytes))
    for offset in range(0, info.nbytes, _BLOCK):
        size = min(_BLOCK, info.nbytes - offset)
        for file, start, room in ((left, tensor.start, one), (right, info.start, two)):
            if file is not None:
                file.read_into(start + offset, memoryview(room)[:size])
        if memoryview(one)[:size] != memoryview(two)[:size]:
            return False
    return True

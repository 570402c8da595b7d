"""Getting the base back from a merged checkpoint: bit for bit, or not at all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import BaseReader, Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.pipeline import is_pipeline
from ..checkpoints.receipt import RECEIPT_NAME, Receipt, receipt_bytes, receipt_damage
from ..checkpoints.sidecar_files import files_beside_weights
from ..engine.undofile.read import UndoFile
from ..engine.undofile.restore import base_size, restore
from ..errors import CheckpointError, InputError, OutputError, VerificationError, printable
from ..files.atomic.checks import require_space
from ..files.atomic.durable import copy_proven
from ..files.atomic.file_of_folder import staging
from ..files.digests import algorithm_of, hash_of, shown_hash
from ..files.expression import Matrix
from ..files.gguf.gguf_header import blank_of
from ..files.progress import Progress, Watching, watched
from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.info import TensorInfo
from ..planning.make import fingerprint
from ..text import Readable, Summary, per_second, size
from .verbs import tells
from .verifying import open_merged

_BLOCK = 1 << 22


@dataclass(frozen=True)
class UnmergeReport(Readable):
    """What was restored: the base of the checkpoint `merged` is in the folder `out` again, bit for bit.

    - `base`, `undo`: which of the two its numbers came from, the other being None
    - `nbytes`: of its tensors; `seconds`: from the call to the rename

    >>> import lorafold
    >>> _ = lorafold.merge("base", ["adapter"], "out")
    >>> report = lorafold.unmerge("out", "restored", base="base")
    >>> print(report)
    restored is the base of out, bit for bit
      from      base
      written   ...B, ... s, ...B/s
    >>> report.to_json()["bytes"] == report.nbytes
    True
    """

    out: str
    merged: str
    base: str | None
    undo: str | None
    nbytes: int
    seconds: float

    def summary(self) -> Summary:
        """What was restored, for people."""
        source = self.undo if self.base is None else self.base
        facts = [
            ("from", printable(str(source))),
            ("written", f"{size(self.nbytes)}, {self.seconds:.1f} s, {per_second(self.nbytes, self.seconds)}"),
        ]
        return Summary(f"{printable(self.out)} is the base of {printable(self.merged)}, bit for bit", facts)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "out": self.out,
            "merged": self.merged,
            "base": self.base,
            "undo": self.undo,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


@tells
def unmerge(
    out: str | os.PathLike[str],
    restored: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    undo: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Watching = None,
) -> UnmergeReport:
    """Write to the folder `restored` what the merged checkpoint `out` was made of, and report.

    - `base`: the numbers that merging changed are copied from there; it is held to the receipt of `out` by its headers, and to
      `out` by every tensor that merging did not change
    - `undo`: without the base, the file that ``merge(…, undo=FILE)`` wrote: it has the factors that were merged, what separates the
      base from the result of subtracting them, and a hash of every tensor, to which what comes out is held
    - `overwrite`: replace a checkpoint at `restored`
    - `progress`: as for `merge`

    They are never computed by subtracting the update alone: that misses the base in about one element of ten, in every dtype, since
    the merged weight was rounded.

    Raises `InputError` without base and undo file, `CheckpointError` where `base` is another one, `VerificationError` where `out`
    or the undo file is damaged or they do not belong together, `OutputError`.

    >>> import lorafold, pathlib
    >>> _ = lorafold.merge("base", ["adapter"], "out", undo="undo.safetensors")
    >>> _ = lorafold.unmerge("out", "restored", undo="undo.safetensors")  # the base itself is not needed
    >>> file = "model-00001-of-00002.safetensors"
    >>> pathlib.Path("restored", file).read_bytes() == pathlib.Path("base", file).read_bytes()
    True
    """
    started = time.monotonic()
    nbytes = _restored(Path(out), Path(restored), base, undo, overwrite, watched(progress))
    given = [None if path is None else str(path) for path in (base, undo)]
    return UnmergeReport(str(restored), str(out), given[0], given[1], nbytes, time.monotonic() - started)


def _restored(
    out: Path,
    restored: Path,
    base: str | os.PathLike[str] | None,
    undo: str | os.PathLike[str] | None,
    overwrite: bool,
    progress: Progress,
) -> int:
    """`unmerge`; the bytes of the tensors that were written."""
    if is_pipeline(out):
        raise InputError(
            f"{printable(str(out))} is a pipeline, whose components were merged one by one",
            hint="give the folder of one that was merged, such as unet, and as `base=BASE` the same of the base's pipeline",
        )
    output, receipt = open_merged(out)
    if receipt.options.only_changed:
        raise InputError(
            f"{printable(str(out))} holds only the tensors that a merge changed; the base is where it was, and as it was",
            hint="there is nothing to restore",
        )
    if base is not None and undo is not None:
        raise InputError("a base and an undo file were given; one of them is enough", hint="leave out `undo=FILE` or `base=BASE`")
    if undo is not None:
        return _from_undo(output, receipt, Path(undo), restored, overwrite, progress)
    if base is None:
        raise InputError(
            f"the base cannot be restored from {printable(str(out))} alone: the merged weights were rounded, and subtracting the"
            " update again misses the base in about one element of ten",
            hint="give the base that it was merged into, `base=BASE`, or the undo file that was written then, `undo=FILE`",
        )
    checkpoint = open_checkpoint(Path(base), prefer="index", repair_index=True)
    if damage := receipt_damage(out, unsealed=True):  # an undo file has a hash of it
        raise VerificationError(f"{printable(str(out))} is not as it was written", failures=damage, hint="nothing was written")
    _check_base(checkpoint, output, receipt)
    if checkpoint.gguf is not None and restored.suffix == ".gguf" and len(checkpoint.shards) > 1:
        raise OutputError(
            f"{printable(str(restored))} cannot be written: the base is {len(checkpoint.shards)} files",
            hint="nothing was written; give the path of a folder",
        )
    with staging(restored)(restored, overwrite=overwrite, inputs=[out, Path(base)]) as staged:
        require_space(restored, checkpoint.nbytes)
        with progress.phase("compare", checkpoint.nbytes) as advance:
            _check_untouched(checkpoint, output, receipt, advance)
        with progress.phase("restore", checkpoint.nbytes) as advance:
            weights = ((shard.name, shard.path) for shard in checkpoint.shards)
            for name, source in (*weights, *files_beside_weights(checkpoint)):
                copy_proven(source, staged.path / name)
                advance(source.stat().st_size)
        staged.commit()
    return checkpoint.nbytes


def _from_undo(output: Checkpoint, receipt: Receipt, path: Path, restored: Path, overwrite: bool, progress: Progress) -> int:
    """The base, from the undo file at `path`."""
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
        with staging(restored)(restored, overwrite=overwrite, inputs=[output.place, path]) as staged:
            size = base_size(undo)
            require_space(restored, size)
            with progress.phase("restore", size) as advance:
                nbytes = restore(undo, output, staged.path, changed=receipt.tensors.keys(), on_bytes=advance)
            staged.commit()
    return nbytes


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

"""Getting the base back from a merged checkpoint: bit for bit, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from .checkpoint import INDEX_NAME, Checkpoint, StagedFolder, companions, copy_file, open_checkpoint, require_space
from .checkpoint.links import resolve_entry
from .errors import CheckpointError, InputError, VerificationError, printable
from .planning import fingerprint
from .progress import Progress, Quiet
from .receipt import RECEIPT_NAME, Receipt
from .regularfile import sha256_of
from .tensorfile import Header, TensorFile, TensorInfo
from .verifying import open_merged

_BLOCK = 1 << 22


def unmerge(
    out: str | os.PathLike[str],
    restored: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write to the folder `restored` what the merged checkpoint `out` was made of, and return the bytes of its tensors.

    The numbers that merging changed are copied from `base`, which is held to the receipt of `out` by its headers, and to `out` by
    every tensor that merging did not change. They are never computed by subtracting the update: that misses the base in about
    one element of ten, in every dtype, since the merged weight was rounded.

    Raises `InputError` without a base, `CheckpointError` where `base` is another one, `VerificationError` where `out` is damaged,
    `OutputError`.
    """
    progress = progress or Quiet()
    output, receipt = open_merged(Path(out))
    if base is None:
        raise InputError(
            f"the base cannot be restored from {printable(str(out))} alone: the merged weights were rounded, and subtracting the"
            " update again misses the base in about one element of ten",
            hint="give the base that it was merged into: --base BASE",
        )
    checkpoint = open_checkpoint(Path(base))
    _check_base(checkpoint, output, receipt)
    with StagedFolder(Path(restored), overwrite=overwrite, inputs=[Path(out), Path(base)]) as staged:
        require_space(Path(restored), checkpoint.nbytes)
        with progress.phase("compare", checkpoint.nbytes) as advance:
            _check_untouched(checkpoint, output, receipt, advance)
        with progress.phase("restore", checkpoint.nbytes) as advance:
            for name, source in _files(checkpoint):
                copy_file(source, staged.path / name)
                if sha256_of(source, error=CheckpointError) != sha256_of(staged.path / name, error=CheckpointError):
                    raise VerificationError(f"{printable(name)} is not what {printable(str(source))} is", hint="run it again")
                advance(source.stat().st_size)
        staged.commit()
    return checkpoint.nbytes


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
    for name, info in checkpoint.tensors.items():
        other = output.tensors.get(name)
        if name not in receipt.tensors and other is not None and not _same(checkpoint, info, output, other):
            raise CheckpointError(
                f"{printable(str(checkpoint.root))} is not the base of {printable(str(output.root))}: tensor '{printable(name)}',"
                " which merging did not change, differs",
                hint="nothing was written; give the base that it was merged into",
            )
        advance(info.nbytes)


def _same(checkpoint: Checkpoint, info: TensorInfo, output: Checkpoint, other: TensorInfo) -> bool:
    if info.nbytes != other.nbytes:
        return False
    with TensorFile(_header(checkpoint, info)) as left, TensorFile(_header(output, other)) as right:
        one, two = bytearray(min(_BLOCK, info.nbytes)), bytearray(min(_BLOCK, info.nbytes))
        for offset in range(0, info.nbytes, _BLOCK):
            size = min(_BLOCK, info.nbytes - offset)
            left.read_into(info.start + offset, memoryview(one)[:size])
            right.read_into(other.start + offset, memoryview(two)[:size])
            if memoryview(one)[:size] != memoryview(two)[:size]:
                return False
    return True


def _header(checkpoint: Checkpoint, info: TensorInfo) -> Header:
    return next(shard.header for shard in checkpoint.shards if shard.path == info.path)


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """What makes up the base, by name: weights, index, what goes along with them, its model card and its receipt."""
    for shard in checkpoint.shards:
        yield shard.name, shard.path
    for path in companions(checkpoint):
        yield str(path.relative_to(checkpoint.root)), path
    if checkpoint.lone:
        return
    index = [INDEX_NAME] if checkpoint.indexed else []
    for name in (*index, "README.md", RECEIPT_NAME):
        if (checkpoint.root / name).exists():
            resolve_entry(checkpoint.root, name)
            yield name, checkpoint.root / name

"""Getting a pipeline back from what was merged of it: each component that was, and the rest as it is."""

from __future__ import annotations

from pathlib import Path

from ...checkpoints.locate import resolve_entry
from ...checkpoints.pipeline import PIPELINE_RECEIPT, is_pipeline
from ...checkpoints.receipt import RECEIPT_NAME, seal_failure
from ...errors import CheckpointError, VerificationError, printable
from ...files.atomic.durable import copy_proven
from ...files.progress import Progress
from ...files.regular import sha256_of
from ..restoring import from_base, from_undo
from .undo_folder import undo_name
from .verify import MergedParts

_CARD = "README.md"


def restore_pipeline(merged: MergedParts, source: Path, folder: Path, progress: Progress, *, by_undo: bool) -> int:
    """Write the base of the pipeline `merged` into `folder`; the bytes of the tensors of the components that were merged.

    `source`: the base, or, `by_undo`, the folder of its undo files. What was not merged is copied from the base, or else from the
    merged pipeline itself, and held to the hashes of its receipt.

    Raises `CheckpointError` where `source` is another one, `VerificationError` where the pipeline is damaged.
    """
    receipt = {} if merged.receipt is None else merged.receipt
    damage = seal_failure(merged.out / PIPELINE_RECEIPT)
    if damage is not None:
        raise VerificationError(f"{printable(str(merged.out / PIPELINE_RECEIPT))} {damage}", hint="nothing was written")
    if not by_undo and not is_pipeline(source):
        raise CheckpointError(
            f"{printable(str(merged.out))} is a pipeline, and {printable(str(source))} is one model",
            hint="nothing was written; give the base that it was merged into",
        )
    nbytes = 0
    for name, component in merged.folders.items():
        if sha256_of(component / RECEIPT_NAME, error=CheckpointError) != receipt["components"][name]:
            raise VerificationError(
                f"{printable(str(component / RECEIPT_NAME))} is not as it was written", hint="nothing was written"
            )
        (folder / name).mkdir()
        if by_undo:
            nbytes += from_undo(component, source / undo_name(name), folder / name, progress)
        else:
            nbytes += from_base(component, source / name, folder / name, progress)
    rest = merged.out if by_undo else source
    with progress.phase("copy", 0):
        for name, sha256 in receipt["files"].items():
            resolve_entry(rest, name)
            if copy_proven(rest / name, folder / name) != sha256:
                raise VerificationError(
                    f"{printable(str(rest / name))} is not what {PIPELINE_RECEIPT} says that the base has",
                    hint="nothing was written",
                )
        if not by_undo and (source / _CARD).is_file():
            resolve_entry(source, _CARD)
            copy_proven(source / _CARD, folder / _CARD)
    return nbytes

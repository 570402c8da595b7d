"""Whether a merged checkpoint holds: against base and adapters, which proves it, or against its receipt, which finds damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..adapters.options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.pipeline import is_pipeline
from ..checkpoints.receipt import RECEIPT_NAME, Receipt, read_receipt
from ..engine.hashes import unchanged
from ..engine.make_receipt import receipt_failures
from ..engine.proof import Proof
from ..engine.prove import prove
from ..engine.sources import Sources
from ..errors import CheckpointError, InputError, VerificationError, printable
from ..files.progress import Progress, Quiet
from ..planning.make import make_plan
from ..planning.plan import MergeOptions
from .loading import AdapterLike, loaded, weighted
from .pipelines.verify import verify_pipeline


def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[AdapterLike] = (),
    *,
    read_options: ReadOptions | None = None,
    progress: Progress | None = None,
) -> Proof:
    """The proof that `out` is `base` with `adapters` folded in, as its receipt says they were.

    Precision, rounding, seed and dtype are the receipt's; `read_options` those that the adapters were read with. What does not
    hold is in the proof's `failures`; `Proof.require` turns them into an error. Without `base` the files are held to the hashes
    in the receipt: that finds every change since the merge, unless the receipt was changed to match.

    Raises `InputError` of the kind that fits where something cannot be read at all, `VerificationError` where `out` has no receipt.
    """
    progress = progress or Quiet()
    if base is None and adapters:
        raise InputError("adapters were given, but not the base that they were merged into", hint="add --base BASE")
    if is_pipeline(Path(out)):
        one = partial(verify, read_options=read_options, progress=progress)
        component = None if read_options is None else read_options.component
        parts = loaded(adapters, read_options)
        return verify_pipeline(Path(out), None if base is None else Path(base), parts, one, component=component)
    output, receipt = open_merged(Path(out))
    if base is None:
        with progress.phase("verify", output.nbytes) as advance:
            return unchanged(output, receipt, on_bytes=advance)
    checkpoint = open_checkpoint(Path(base), prefer="index", repair_index=True)
    chosen = weighted(adapters, checkpoint, read_options)
    options = MergeOptions(
        receipt.precision,
        receipt.rounding,
        receipt.seed,
        receipt.dtype,
        None,
        receipt.on_overflow,
        receipt.allow_nonfinite_base,
        receipt.only_changed,
    )
    merge_plan = make_plan(checkpoint, chosen, options, merge_again=True, allow_partial=bool(receipt.unmatched))
    with Sources(merge_plan, checkpoint, [each.adapter for each in chosen]) as sources:
        size = output.nbytes
        with progress.phase("verify", size) as advance:
            proof = prove(output, sources, on_bytes=advance)
    return replace(proof, failures=(*proof.failures, *receipt_failures(receipt, merge_plan, checkpoint, proof)))


def open_merged(out: Path) -> tuple[Checkpoint, Receipt]:
    """The merged checkpoint at `out` and its receipt. One that cannot be read any more is one that does not hold.

    Raises `VerificationError` where it has no receipt or is damaged, `CheckpointError` where there is no checkpoint at all.
    """
    if not (out / RECEIPT_NAME).exists():
        open_checkpoint(out)  # where it is no checkpoint at all, this says so
        raise VerificationError(
            f"{printable(str(out))} has no {RECEIPT_NAME}: how it was rounded is not known", hint="was it made by lorafold merge?"
        )
    try:
        receipt = read_receipt(out)
        output = open_checkpoint(out)
    except CheckpointError as error:
        raise VerificationError(error.message, hint="do not use it: merge again") from error
    if receipt is None:
        raise VerificationError(f"{printable(str(out))} has no {RECEIPT_NAME}")
    return output, receipt

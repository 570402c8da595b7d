"""Whether a merged checkpoint holds: against base and adapters, which proves it, or against its receipt, which finds damage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..adapters.read_options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.receipt import RECEIPT_NAME, Receipt, read_receipt, receipt_bytes, receipt_damage
from ..engine.claims import added_files, not_covered, not_part
from ..engine.hashes import tensor_hashes, unchanged
from ..engine.make_receipt import receipt_failures
from ..engine.proof import Proof
from ..engine.prove import prove
from ..engine.sidecars import own_files
from ..engine.sources import Sources
from ..errors import CheckpointError, InputError, PlanError, VerificationError, printable
from ..files.progress import Progress, Watching, watched
from ..files.regular import sha256_of
from ..options import MatchOptions
from ..planning.gguf_files import as_output
from .components import Component, divided, open_base
from .given import AdapterLike, loaded
from .pipelines.verify import MergedParts, merged_parts
from .verbs import tells


@tells
def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapters: Sequence[AdapterLike] = (),
    *,
    read_options: ReadOptions | None = None,
    requantise_from: str | os.PathLike[str] | None = None,
    progress: Watching = None,
) -> Proof:
    """The proof that `out` is `base` with `adapters` folded in, as its receipt says they were.

    Precision, rounding, seed and dtype are the receipt's; `read_options` those that the adapters were read with. What does not
    hold is in the proof's `failures`; `Proof.raise_for_failures` turns them into an error. Without `base` the files are held to
    the hashes in the receipt: that finds every change since the merge, unless the receipt was changed to match, with the hash of
    itself in it. A model card that was changed and documents that were added are in its `notes`; what is not looked at is in
    `not_covered`, and `lorafold.engine.proof` has the whole table.

    - `requantise_from`: the original, where codes were made of one
    - `progress`: as for `merge`

    Raises `InputError` of the kind that fits where something cannot be read at all, `VerificationError` where `out` has no receipt.

    >>> import lorafold
    >>> _ = lorafold.merge("base", ["adapter"], "out")
    >>> lorafold.verify("out", "base", ["adapter"]).ok
    True
    >>> print(lorafold.verify("out", "base", [("adapter", 0.5)]))
    out is not what base and adapters say it must be, in ... places
    ...
    >>> lorafold.verify("out").ok  # by the hashes in its receipt
    True
    """
    progress = watched(progress)
    if base is None and adapters:
        raise InputError("adapters were given, but not the base that they were merged into", hint="add `base=BASE`")
    merged = merged_parts(Path(out))
    given = loaded(adapters, read_options)
    if base is None:
        return _with_card(as_written(Path(out), progress), merged)
    match = replace(_AS_IT_WAS, requantise_from=requantise_from)
    division = divided(open_base(Path(base), match), given, allow_partial=merged.partial)
    merged.check_kind(division.base)
    components = {component.name: component for component in division.components}
    proofs = {name: _proven(folder, components[name], progress) for name, folder in merged.folders.items() if name in components}
    return _with_card(replace(merged.proof(proofs, division), out=str(out)), merged)


def as_written(out: Path, progress: Progress) -> Proof:
    """The proof that `out` is as it was written, by the hashes in its receipt, but for the model card. Raises as `verify` does."""
    merged = merged_parts(out)
    found = merged.proof({name: component_as_written(folder, progress) for name, folder in merged.folders.items()}, None)
    return replace(found, out=str(out), replayed=False)


def _with_card(proof: Proof, merged: MergedParts) -> Proof:
    note = merged.card_note()
    return proof if note is None else replace(proof, notes=(note, *proof.notes))


_AS_IT_WAS = MatchOptions(prefer="index", repair_index=True, merge_again=True)
"""How the base of a merge is opened that went well: what was allowed then is known by its result."""


def component_as_written(folder: Path, progress: Progress) -> Proof:
    """The proof that the merged checkpoint in `folder`, one model, is as it was written. Raises as `verify` does."""
    output, receipt = open_merged(folder)
    with progress.phase("verify", output.nbytes) as advance:
        proof = unchanged(output, receipt, on_bytes=advance)
    return replace(proof, failures=(*proof.failures, *receipt_damage(folder)))


def _proven(folder: Path, component: Component, progress: Progress) -> Proof:
    """The proof that the checkpoint in `folder` is `component` with its adapters."""
    output, receipt = open_merged(folder)
    match = replace(_AS_IT_WAS, allow_partial=bool(receipt.unmatched))
    damage = receipt_damage(folder)
    if "original" in receipt.base and component.checkpoint.original is None:
        raise InputError(
            f"the codes of {printable(str(folder))} were made of an original, which was not given",
            hint="add `requantise_from=ORIGINAL`",
        )
    try:
        plan, checkpoint = component.plan(receipt.options, match), component.checkpoint
    except PlanError as error:
        if not damage:
            raise
        raise VerificationError(f"{damage[0]}; {error.message}", hint="do not use it: merge again") from error
    sources = Sources(plan, checkpoint, [each.adapter for each in component.adapters])
    with sources, progress.phase("verify", output.nbytes) as advance:
        proof = prove(output, sources, hashes=receipt.files, on_bytes=advance)
        own, weights = own_files(sources), {shard.name for shard in output.shards}
        aside = () if checkpoint.gguf else added_files(folder, own | weights)[1]
    beside = {name: sha256_of(folder / name, error=CheckpointError) for name in sorted(own - weights) if (folder / name).is_file()}
    told = [name for name in receipt.beside if any(failure.startswith(f"{printable(name)} ") for failure in proof.failures)]
    beside |= {name: receipt.beside[name] for name in told}  # once is enough
    tensors = tensor_hashes(output.shards) if receipt.tensor_hashes else {}
    return replace(
        proof,
        failures=(*proof.failures, *damage, *receipt_failures(receipt, plan, checkpoint, proof, beside, tensors)),
        notes=tuple(not_part(aside)),
        not_covered=not_covered(by_receipt=False),
    )


def open_merged(out: Path) -> tuple[Checkpoint, Receipt]:
    """The merged checkpoint at `out` and its receipt. One that cannot be read any more is one that does not hold.

    Raises `VerificationError` where it has no receipt or is damaged, `CheckpointError` where there is no checkpoint at all.
    """
    if receipt_bytes(out) is None:
        open_checkpoint(out)  # where it is no checkpoint at all, this says so
        raise VerificationError(
            f"{printable(str(out))} has no {RECEIPT_NAME}: how it was rounded is not known", hint="was it made by lorafold merge?"
        )
    try:
        receipt = read_receipt(out)
        output = as_output(open_checkpoint(out))
    except CheckpointError as error:
        raise VerificationError(error.message, hint="do not use it: merge again") from error
    if receipt is None:
        raise VerificationError(f"{printable(str(out))} has no {RECEIPT_NAME}")
    return output, receipt

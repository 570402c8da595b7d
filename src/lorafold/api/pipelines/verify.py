"""Proving a merged pipeline: each component that was merged, and that everything else is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoints.pipeline import PIPELINE_RECEIPT, files_apart, is_pipeline, read_pipeline_receipt
from ...checkpoints.receipt import RECEIPT_NAME, seal_failure
from ...engine.claims import added_files, not_covered, not_part
from ...engine.modelcard import card_note
from ...engine.proof import Proof
from ...errors import CheckpointError, InputError, printable
from ...files.regular import sha256_of
from ..components import Division, OpenBase, joined_proofs


@dataclass(frozen=True)
class MergedParts:
    """An output: the folders of its merged components by name, that of an output that is one model by the empty name.

    `receipt`: of the pipeline, where it is one
    """

    out: Path
    folders: Mapping[str, Path]
    receipt: Mapping[str, Any] | None = None

    @property
    def partial(self) -> bool:
        """Whether something of the adapters was left out because the pipeline has no component for it."""
        return self.receipt is not None and bool(self.receipt.get("left_out"))

    @property
    def only_changed(self) -> bool:
        """Whether it is a pipeline of which only the tensors that change were written."""
        return self.receipt is not None and self.receipt.get("only_changed") is True

    def check_kind(self, base: OpenBase) -> None:
        """Raises `CheckpointError` where one of output and base is a pipeline, and the other is not."""
        if (self.receipt is None) != (base.pipeline is None):
            words = ("a pipeline", "one model")
            found, other = words if self.receipt is not None else words[::-1]
            raise CheckpointError(
                f"{printable(str(self.out))} is {found}, and {printable(str(base.root))} is {other}",
                hint="give the base that it was merged into",
            )

    def proof(self, proofs: Mapping[str, Proof], division: Division | None) -> Proof:
        """The proof of the whole from those of its parts; `division`: what base and adapters are, or None for what was written."""
        if self.receipt is None:
            return proofs[""]
        failures = list(_component_failures(self.out, self.receipt, division))
        pipeline = None if division is None else division.base.pipeline
        apart = None if self.only_changed else pipeline
        sources: dict[str, Path] = {} if apart is None else files_apart(apart, tuple(self.receipt["components"]))
        failures += [f"{printable(name)} was not copied" for name in sources if name not in self.receipt["files"]]
        for name, sha256 in self.receipt["files"].items():
            failure = _copy_failure(self.out / name, sha256, sources.get(name), wanted=apart is not None)
            if failure is not None:
                failures.append(f"{printable(name)} {failure}")
        if division is not None and sorted(self.receipt.get("left_out", ())) != sorted(division.left_out):
            failures.append(f"{PIPELINE_RECEIPT}: what it says was left out of the adapters is not what was")
        damage = seal_failure(self.out / PIPELINE_RECEIPT)
        failures += [] if damage is None else [f"{PIPELINE_RECEIPT}: {damage}"]
        others, of_people = _added(self.out, self.receipt)
        proof = joined_proofs(proofs)
        return replace(
            proof,
            failures=(*proof.failures, *failures, *others),
            notes=(*proof.notes, *of_people),
            not_covered=not_covered(by_receipt=division is None, only_changed=self.only_changed),
        )

    def card_note(self) -> str | None:
        """What has become of the model card, in words; None where it is as it was written, or a component, which has none."""
        if self.receipt is not None:
            return card_note(self.out, PIPELINE_RECEIPT)
        return None if self.out.is_file() or (self.out.parent / PIPELINE_RECEIPT).exists() else card_note(self.out)


def merged_parts(out: Path) -> MergedParts:
    """What of `out` was merged.

    Raises `VerificationError` where `out` is a pipeline without a receipt.
    """
    if not is_pipeline(out) and not (out / PIPELINE_RECEIPT).exists():
        return MergedParts(out, {"": out})
    receipt = read_pipeline_receipt(out)
    return MergedParts(out, {name: out / name for name in receipt["components"]}, receipt)


def _added(out: Path, receipt: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What was added, in words, outside the components that were merged: what counts, and what people did."""
    found = added_files(out, {*receipt["files"], PIPELINE_RECEIPT})
    outside = ([name for name in names if name.partition("/")[0] not in receipt["components"]] for names in found)
    others, of_people = (not_part(names) for names in outside)
    return others, of_people


def _component_failures(out: Path, receipt: Mapping[str, Any], division: Division | None) -> Iterator[str]:
    """Components that are not those that `division` says, and receipts that are not as they were written."""
    expected = None if division is None else [component.name for component in division.components]
    for name, sha256 in receipt["components"].items():
        if expected is not None and name not in expected:
            yield f"{printable(name)} was merged, but nothing of the adapters given is for it"
            continue
        failure = _copy_failure(out / name / RECEIPT_NAME, sha256, None, wanted=False)
        if failure is not None:
            yield f"{printable(name)}/{RECEIPT_NAME} {failure}"
    for name in expected or ():
        if name not in receipt["components"]:
            yield f"{printable(name)} was not merged, but the adapters have a part for it"


def _copy_failure(found: Path, sha256: str, source: Path | None, *, wanted: bool) -> str | None:
    try:
        if sha256_of(found) != sha256:
            return "is not as it was written"
    except InputError:
        return "is missing"
    if not wanted:
        return None
    return None if source is not None and sha256_of(source, error=CheckpointError) == sha256 else "is not what the base has"

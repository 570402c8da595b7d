"""Proving a merged pipeline: each component that was merged, and that everything else is what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checkpoints.pipeline import PIPELINE_RECEIPT, files_apart, is_pipeline
from ...checkpoints.receipt import RECEIPT_NAME
from ...engine.proof import Proof
from ...errors import CheckpointError, InputError, VerificationError, printable
from ...files import strictjson
from ...files.regular import sha256_of
from ..components import Division, OpenBase
from .joined import joined_proofs


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
        sources: dict[str, Path] = {} if pipeline is None else files_apart(pipeline, tuple(self.receipt["components"]))
        failures += [f"{printable(name)} was not copied" for name in sources if name not in self.receipt["files"]]
        for name, sha256 in self.receipt["files"].items():
            failure = _copy_failure(self.out / name, sha256, sources.get(name), wanted=pipeline is not None)
            if failure is not None:
                failures.append(f"{printable(name)} {failure}")
        proof = joined_proofs(proofs)
        return replace(proof, failures=(*proof.failures, *failures))


def merged_parts(out: Path) -> MergedParts:
    """What of `out` was merged.

    Raises `VerificationError` where `out` is a pipeline without a receipt.
    """
    if not is_pipeline(out):
        return MergedParts(out, {"": out})
    receipt = _read_receipt(out)
    return MergedParts(out, {name: out / name for name in receipt["components"]}, receipt)


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


def _read_receipt(out: Path) -> dict[str, Any]:
    path = out / PIPELINE_RECEIPT
    if not path.exists():
        raise VerificationError(
            f"{printable(str(out))} has no {PIPELINE_RECEIPT}: what was merged is not known", hint="was it made by lorafold merge?"
        )
    value = strictjson.load(path, error=CheckpointError)
    for field in ("components", "files"):
        names = value.get(field) if isinstance(value, dict) else None
        good = isinstance(names, dict) and all(isinstance(sha256, str) for sha256 in names.values())
        if not good or any(".." in name.split("/") or name.startswith("/") or "\0" in name for name in names or ()):
            raise VerificationError(f"{printable(str(path))}: {field} must be an object of hashes by path", hint="merge again")
    return dict(value)

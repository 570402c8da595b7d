"""Proving a merged pipeline: each component that was merged, and that everything else is what it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...adapters.adapter import WeightedAdapter
from ...checkpoints.pipeline import PIPELINE_RECEIPT, files_apart, open_pipeline
from ...checkpoints.receipt import RECEIPT_NAME
from ...engine.proof import Proof
from ...errors import CheckpointError, InputError, VerificationError, printable
from ...files import strictjson
from ...files.regular import sha256_of
from .divide import divide
from .joined import joined_proofs

Verifying = Callable[[Path, Path | None, Sequence[WeightedAdapter]], Proof]
"""How one component is proven: from its folder, that of the base, if there is one, and its share of the adapters."""


def verify_pipeline(
    out: Path, base: Path | None, adapters: Sequence[WeightedAdapter], verify: Verifying, *, component: str | None = None
) -> Proof:
    """The proof that the pipeline `out` is `base` with `adapters`, or without `base` that it is as its receipts say.

    Raises as `verify` does, `VerificationError` where `out` has no receipt.
    """
    receipt = _read_receipt(out)
    pipeline = None if base is None else open_pipeline(base)
    shares: Mapping[str, Sequence[WeightedAdapter]] = dict.fromkeys(receipt["components"], ())
    if pipeline is not None:
        division = divide(pipeline, adapters, component=component, allow_partial=bool(receipt.get("left_out")))
        shares = division.shares
    failures: list[str] = []
    proofs: dict[str, Proof] = {}
    for name, sha256 in receipt["components"].items():
        if name not in shares:
            failures.append(f"{printable(name)} was merged, but nothing of the adapters given is for it")
            continue
        failure = _copy_failure(out / name / RECEIPT_NAME, sha256, None, wanted=False)
        if failure is not None:
            failures.append(f"{printable(name)}/{RECEIPT_NAME} {failure}")
        proofs[name] = verify(out / name, None if pipeline is None else pipeline.root / name, shares[name])
    failures += [f"{printable(name)} was not merged, but the adapters have a part for it" for name in shares if name not in proofs]
    sources: dict[str, Path] = {} if pipeline is None else files_apart(pipeline, tuple(receipt["components"]))
    failures += [f"{printable(name)} was not copied" for name in sources if name not in receipt["files"]]
    for name, sha256 in receipt["files"].items():
        failure = _copy_failure(out / name, sha256, sources.get(name), wanted=pipeline is not None)
        if failure is not None:
            failures.append(f"{printable(name)} {failure}")
    proof = joined_proofs(proofs)
    return replace(proof, failures=(*proof.failures, *failures))


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

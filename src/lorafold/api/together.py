"""Several outputs of one command, which appear one after the other: run again after it was killed in between, it makes the rest.

Before the first appears, a hidden file beside them says which they are; it goes when the last is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.pipeline import PIPELINE_RECEIPT
from ..checkpoints.receipt import LARGEST, RECEIPT_NAME, receipt_bytes
from ..engine.proof import Proof
from ..engine.report import MergeReport, peak_memory
from ..engine.resume import journal_fields
from ..errors import InputError, LorafoldError
from ..files import strictjson
from ..files.atomic.checks import output_fault
from ..files.atomic.durable import sync_folder, write_text
from ..files.progress import Progress
from ..files.regular import sha256_of
from ..kernel.stats import Kept
from ..options import RunOptions
from .components import Planned
from .verifying import as_written

Entries = dict[str, dict[str, Any]]
"""By name of an output, the hash of its receipt and what else its report needs."""


@dataclass(frozen=True)
class Together:
    """The outputs of one command; `record`: the file that says which of them have appeared, if it was stopped in between."""

    outputs: Sequence[tuple[Planned, Path]]
    run: RunOptions
    record: Path

    def appeared(self, progress: Progress) -> dict[Path, MergeReport]:
        """The outputs that an earlier run of this very command has put in their places, whole, with a report for each."""
        entries = self._entries()
        found = {}
        for planned, out in self.outputs:
            try:
                if out.name in entries and entries[out.name]["receipt"] == _receipt_of(out):
                    proof = as_written(out, progress) if self.run.verify else None
                    if proof is None or proof.ok:
                        found[out] = _report(planned, out, entries[out.name], proof)
            except (LorafoldError, KeyError, TypeError, ValueError):
                continue  # it is not what was written: it is in the way, as any other
        return found

    def note(self, made: Sequence[tuple[MergeReport, Path]]) -> None:
        """Write down what is about to appear: for each output its report, and the hidden folder in which it is whole.

        Raises `OutputError` where that cannot be written.
        """
        entries = self._entries()
        for report, folder in made:
            kept = {name: each.numbers for name, each in report.kept.items()}
            linked = list(report.linked)
            entries[Path(report.out).name] = {
                "receipt": _receipt_of(folder), "kept": kept, "bytes": report.nbytes, "linked": linked
            }  # fmt: skip
        aside = self.record.with_name(f"{self.record.name}.{os.getpid()}")
        write_text(aside, json.dumps(entries) + "\n")
        try:
            os.replace(aside, self.record)
        except OSError as cause:
            raise output_fault(cause, self.record) from cause
        sync_folder(self.record.parent)

    def end(self) -> None:
        """All have appeared."""
        self.record.unlink(missing_ok=True)

    def _entries(self) -> Entries:
        try:
            value = strictjson.load(self.record, limit=LARGEST)
        except InputError:
            return {}
        return value if isinstance(value, dict) and all(isinstance(each, dict) for each in value.values()) else {}


def together(outputs: Sequence[tuple[Planned, Path]], run: RunOptions) -> Together:
    """The outputs of the command that makes `outputs`, all in one folder, as `run` says."""
    parts = [
        [str(out.absolute()), [[component.name, journal_fields(plan, component.checkpoint)] for component, plan in planned.parts]]
        for planned, out in outputs
    ]
    text = strictjson.canonical([parts, run.link, run.verify, run.hash_tensors, run.hash])
    return Together(outputs, run, outputs[0][1].parent / f".lorafold-each-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json")


def _receipt_of(folder: Path) -> str:
    if folder.is_file():  # which has its receipt in itself
        return hashlib.sha256(receipt_bytes(folder) or b"").hexdigest()
    name = PIPELINE_RECEIPT if (folder / PIPELINE_RECEIPT).exists() else RECEIPT_NAME
    return sha256_of(folder / name)


def _report(planned: Planned, out: Path, entry: Mapping[str, Any], proof: Proof | None) -> MergeReport:
    return MergeReport(
        out=str(out),
        plan=planned.joined(),
        kept={name: Kept.of(numbers) for name, numbers in entry["kept"].items()},
        nbytes=int(entry["bytes"]),
        seconds=0.0,
        seconds_verifying=0.0,
        peak_memory=peak_memory(),
        proof=proof,
        notes=("it was in its place already, from a run of this command that was stopped",),
        linked=tuple(entry["linked"]),
    )

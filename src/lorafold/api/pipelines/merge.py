"""Planning and writing a whole pipeline: every component is planned before the first is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ...adapters.adapter import WeightedAdapter
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.open import open_checkpoint
from ...checkpoints.pipeline import PIPELINE_RECEIPT, Pipeline, files_apart, open_pipeline
from ...checkpoints.receipt import RECEIPT_NAME
from ...engine.modelcard import base_license
from ...engine.report import MergeReport, peak_memory
from ...engine.unchanged_files import not_linked
from ...errors import CheckpointError, printable
from ...files.atomic.checks import require_space
from ...files.atomic.copying import link_file
from ...files.atomic.durable import copy_proven, write_json, write_text
from ...files.atomic.folder import StagedFolder
from ...files.progress import Progress, Quiet
from ...files.regular import sha256_of
from ...planning.plan import MergePlan
from ...version import __version__
from .divide import divide
from .joined import joined_plans, joined_proofs

Planning = Callable[[Path, Sequence[WeightedAdapter]], MergePlan]
"""How one component is planned: from its folder and its share of the adapters."""

Merging = Callable[[Path, Sequence[WeightedAdapter], Path], MergeReport]
"""How one is merged: from these, into the folder that is to be written."""


def plan_pipeline(
    base: Path, adapters: Sequence[WeightedAdapter], plan: Planning, *, component: str | None = None, allow_partial: bool = False
) -> MergePlan:
    """The plans of all components of the pipeline `base` that change, as one to show; the options are those of `merge_pipeline`.

    Raises `UnmatchedAdapterError` where a part of an adapter has no component, and as `plan` does.
    """
    pipeline = open_pipeline(base)
    division = divide(pipeline, adapters, component=component, allow_partial=allow_partial)
    plans = {name: plan(pipeline.root / name, share) for name, share in division.shares.items()}
    return joined_plans(base, adapters, plans, division.left_out)


def merge_pipeline(
    base: Path,
    adapters: Sequence[WeightedAdapter],
    out: Path,
    *,
    plan: Planning,
    merge: Merging,
    component: str | None = None,
    allow_partial: bool = False,
    overwrite: bool = False,
    link: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> MergeReport:
    """Write the pipeline `base` with `adapters` folded into its components to the folder `out`, and report.

    - `component`: what an adapter is for that names none, by default the main model
    - `link`: link files of weights that are copied, where the file system can
    - `progress`: told of the bytes that are copied; `command`: what made it, for its model card

    Raises as `merge` does; on any error nothing is at `out`.
    """
    started = time.monotonic()
    pipeline = open_pipeline(base)
    division = divide(pipeline, adapters, component=component, allow_partial=allow_partial)
    shares = division.shares
    plans = {name: plan(pipeline.root / name, share) for name, share in shares.items()}
    copied = files_apart(pipeline, tuple(shares))
    reports: dict[str, MergeReport] = {}
    inputs = [base, *(weighted.adapter.path for weighted in adapters)]
    with StagedFolder(out, overwrite=overwrite, inputs=inputs, linked=link) as staged:
        linked, unlinked = _link(copied, staged.path) if link else ([], [])
        weights = sum(open_checkpoint(pipeline.root / name).nbytes for name in shares)
        require_space(out, weights + sum(path.stat().st_size for name, path in copied.items() if name not in linked))
        aside = staged.path / ".components"  # a merge locks the folder that it writes in, which the staged one is already
        aside.mkdir()
        for name, share in shares.items():
            try:
                reports[name] = merge(pipeline.root / name, share, aside / name)
            except BaseException as error:
                if hasattr(error, "__notes__"):
                    error.__notes__.clear()  # what was finished of this component goes with the pipeline
                raise
            (aside / name / "README.md").unlink()  # the pipeline has one
            os.rename(aside / name, staged.path / name)
        aside.rmdir()
        hashes = _copy(copied, staged.path, linked, progress or Quiet())
        receipts = {name: sha256_of(staged.path / name / RECEIPT_NAME, error=CheckpointError) for name in shares}
        receipt = {"version": __version__, "components": receipts, "files": hashes, "left_out": list(division.left_out)}
        write_json(staged.path / PIPELINE_RECEIPT, receipt)
        write_text(staged.path / "README.md", _card(pipeline, adapters, tuple(shares), command))
        staged.commit()
    return MergeReport(
        out=str(out),
        plan=joined_plans(base, adapters, plans, division.left_out),
        kept={f"{name}/{tensor}": kept for name, report in reports.items() for tensor, kept in report.kept.items()},
        nbytes=sum(report.nbytes for report in reports.values()),
        seconds=time.monotonic() - started,
        seconds_verifying=sum(report.seconds_verifying for report in reports.values()),
        peak_memory=peak_memory(),
        proof=joined_proofs({name: report.proof for name, report in reports.items() if report.proof is not None}),
        notes=(*staged.notes, *(f"{name}: {note}" for name, report in reports.items() for note in report.notes), *unlinked),
        linked=(*(f"{name}/{file}" for name, report in reports.items() for file in report.linked), *linked),
    )


def _link(files: Mapping[str, Path], folder: Path) -> tuple[list[str], list[str]]:
    """Link those of `files` that hold weights into `folder`, by their path in it; which, and in words why not others."""
    linked: list[str] = []
    faults: dict[str, OSError] = {}
    for name in (name for name in files if name.endswith(".safetensors")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fault = link_file(files[name], folder / name)
        if fault is None:
            linked.append(name)
        else:
            faults[name] = fault
    return linked, not_linked(faults)


def _copy(files: Mapping[str, Path], folder: Path, linked: Collection[str], progress: Progress) -> dict[str, str]:
    """Copy `files` into `folder`, by their path in it, but for those that are `linked`; the sha256 of all."""
    hashes: dict[str, str] = {}
    with progress.phase("copy", sum(path.stat().st_size for path in files.values())) as advance:
        for name, source in files.items():
            target = folder / name
            hashes[name] = sha256_of(target, error=CheckpointError) if name in linked else copy_proven(source, target)
            advance(source.stat().st_size)
    return hashes


def _card(pipeline: Pipeline, adapters: Sequence[WeightedAdapter], changed: Sequence[str], command: str | None) -> str:
    """README.md of the merged pipeline, with the head that model hubs read."""
    name = Checkpoint(pipeline.root, (), {}, None, {}, False).name
    names = [printable(weighted.adapter.name).replace("`", "'") for weighted in adapters]
    head = [f"base_model: {json.dumps(name)}", "base_model_relation: merge", "library_name: diffusers"]
    head += [*base_license(pipeline.root), "tags:", "- lora", "- merged", "- lorafold"]
    parts = [
        f"`{adapter}`" + (f" at weight {w.adapter_weight:g}" if w.adapter_weight != 1 else "")
        for adapter, w in zip(names, adapters, strict=True)
    ]
    lines = [
        "---", *head, "---", "", f"# {' + '.join(names)}, merged", "",
        f"`{printable(name)}` with {' and '.join(parts)} folded into {', '.join(changed)} by lorafold {__version__}.",
        f"Every tensor, its scaling and how it was rounded are in `{RECEIPT_NAME}` in the folder of each.",
    ]  # fmt: skip
    if command is not None:
        lines += ["", "```sh", printable(command).replace("`", "'"), "```"]
    return "\n".join(lines) + "\n"

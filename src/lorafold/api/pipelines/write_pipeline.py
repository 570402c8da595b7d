"""Outputs of one base written in one go, whether it is one model or a pipeline: none appears before all are finished."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ...adapters.adapter import WeightedAdapter
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.open_gguf import check_ending
from ...checkpoints.pipeline import PIPELINE_RECEIPT, Pipeline, files_apart
from ...checkpoints.receipt import RECEIPT_NAME, sealed
from ...engine.merge_outputs import Before, merge_outputs
from ...engine.modelcard import base_license, write_card
from ...engine.report import MergeReport, peak_memory
from ...engine.sources import Sources
from ...engine.unchanged_files import not_linked
from ...errors import CheckpointError, printable
from ...files.atomic.checks import require_space
from ...files.atomic.durable import copy_proven, link_file, write_text
from ...files.atomic.folder import StagedFolder
from ...files.progress import Progress
from ...files.regular import sha256_of
from ...options import RunOptions
from ...version import __version__
from ..components import Planned, joined_proofs
from ..together import together


@dataclass(frozen=True)
class _Staged:
    """An output that is being made: its hidden folder, and in that where its components are put one by one."""

    planned: Planned
    out: Path
    folder: StagedFolder
    linked: list[str]
    unlinked: list[str]
    reports: dict[str, MergeReport]

    @property
    def aside(self) -> Path:
        return self.folder.path / ".components"  # a merge locks the folder that it writes in, which the staged one is already

    @property
    def copied(self) -> dict[str, Path]:
        """The files that belong to none of the components that change."""
        return files_apart(_pipeline(self.planned), tuple(component.name for component in self.planned.of.components))


def write_outputs(outputs: Sequence[tuple[Planned, Path]], run: RunOptions, progress: Progress) -> list[MergeReport]:
    """Carry out each of `outputs`, which have the same base, into its folder; a report for each.

    Where a run of the same command was killed when some had appeared, those are left as they are.

    Raises as `merge` does; on any error none of them is there.
    """
    if len(outputs) == 1 or run.overwrite or run.restart:
        return _write(outputs, run, progress)
    group = together(outputs, run)
    there = group.appeared(progress)
    left = [each for each in outputs if each[1] not in there]
    made = iter(_write(left, run, progress, group.note) if left else ())
    group.end()
    return [there[out] if out in there else next(made) for _, out in outputs]


def _write(
    outputs: Sequence[tuple[Planned, Path]], run: RunOptions, progress: Progress, before: Before | None = None
) -> list[MergeReport]:
    """As `write_outputs`, all of them; `before` is told of them before the first appears."""
    base = outputs[0][0].of.base
    if base.pipeline is not None:
        return write_pipelines(base.pipeline, outputs, run, progress, before)
    wanted: dict[Path, Sources] = {}
    for planned, out in outputs:
        ((component, plan),) = planned.parts
        check_ending(out, component.checkpoint)
        wanted[out] = Sources(plan, component.checkpoint, [weighted.adapter for weighted in component.adapters])
    return merge_outputs(base.root, wanted, run, progress, before)


def write_pipelines(
    pipeline: Pipeline,
    outputs: Sequence[tuple[Planned, Path]],
    run: RunOptions,
    progress: Progress,
    before: Before | None = None,
) -> list[MergeReport]:
    """Write `pipeline` with the plans of each of `outputs` carried out on its components to that one's folder; a report for each.

    A component is read once for all outputs that change it. Raises as `merge` does; on any error none of the outputs is there.
    """
    started = time.monotonic()
    alone = replace(run, overwrite=False, restart=False, command=None)
    with ExitStack() as stack:
        staged = [_begin(planned, out, run, stack) for planned, out in outputs]
        require_space(outputs[0][1], sum(_needed(each) for each in staged))
        for name in pipeline.models:
            _merge(name, [each for each in staged if name in _names(each)], alone, progress)
        for each in staged:
            _complete(each, progress, run.command)
        reports = [_report(each) for each in staged]
        if before is not None:
            before([(report, each.folder.path) for report, each in zip(reports, staged, strict=True)])
        for each in staged:
            each.folder.commit()
    seconds = time.monotonic() - started
    return [replace(report, seconds=seconds) for report in reports]


def _begin(planned: Planned, out: Path, run: RunOptions, stack: ExitStack) -> _Staged:
    inputs = [planned.of.base.root, *(weighted.adapter.path for weighted in planned.of.given)]
    folder = stack.enter_context(StagedFolder(out, overwrite=run.overwrite, inputs=inputs, linked=run.link))
    staged = _Staged(planned, out, folder, [], [], {})
    if run.link:
        linked, unlinked = _link(staged.copied, folder.path)
        staged.linked.extend(linked)
        staged.unlinked.extend(unlinked)
    staged.aside.mkdir()
    return staged


def _names(staged: _Staged) -> list[str]:
    return [component.name for component in staged.planned.of.components]


def _needed(staged: _Staged) -> int:
    """Bytes that are to be written."""
    weights = sum(component.checkpoint.nbytes for component in staged.planned.of.components)
    return weights + sum(path.stat().st_size for name, path in staged.copied.items() if name not in staged.linked)


def _merge(name: str, several: Sequence[_Staged], run: RunOptions, progress: Progress) -> None:
    """Write the component `name` of each of `several`, and move it to its place."""
    if not several:
        return
    wanted: dict[Path, Sources] = {}
    for each in several:
        component, plan = next(part for part in each.planned.parts if part[0].name == name)
        adapters = [weighted.adapter for weighted in component.adapters]
        wanted[each.aside / name] = Sources(plan, component.checkpoint, adapters)
    base = several[0].planned.of.base
    try:
        reports = merge_outputs(base.folder(name), wanted, run, progress)
    except BaseException as error:
        if hasattr(error, "__notes__"):
            error.__notes__.clear()  # what was finished of this component goes with the pipeline
        raise
    for each, report in zip(several, reports, strict=True):
        each.reports[name] = report
        (each.aside / name / "README.md").unlink()  # the pipeline has one
        os.rename(each.aside / name, each.folder.path / name)


def _complete(staged: _Staged, progress: Progress, command: str | None) -> None:
    """Put beside the components what is copied, the receipt and the model card."""
    staged.aside.rmdir()
    folder, names = staged.folder.path, _names(staged)
    hashes = _copy(staged.copied, folder, staged.linked, progress)
    receipts = {name: sha256_of(folder / name / RECEIPT_NAME, error=CheckpointError) for name in names}
    receipt = {"version": __version__, "components": receipts, "files": hashes, "left_out": list(staged.planned.of.left_out)}
    write_text(folder / PIPELINE_RECEIPT, sealed(receipt))
    write_card(folder, _card(_pipeline(staged.planned), staged.planned.of.given, names, command), PIPELINE_RECEIPT)


def _report(staged: _Staged) -> MergeReport:
    reports = {name: staged.reports[name] for name in _names(staged)}
    return MergeReport(
        out=str(staged.out),
        plan=staged.planned.joined(),
        kept={f"{name}/{tensor}": kept for name, report in reports.items() for tensor, kept in report.kept.items()},
        nbytes=sum(report.nbytes for report in reports.values()),
        seconds=0.0,
        seconds_verifying=sum(report.seconds_verifying for report in reports.values()),
        peak_memory=peak_memory(),
        proof=joined_proofs({name: report.proof for name, report in reports.items() if report.proof is not None}),
        notes=(
            *staged.folder.notes,
            *(f"{name}: {note}" for name, report in reports.items() for note in report.notes),
            *staged.unlinked,
        ),
        linked=(*(f"{name}/{file}" for name, report in reports.items() for file in report.linked), *staged.linked),
    )


def _pipeline(planned: Planned) -> Pipeline:
    if planned.of.base.pipeline is None:
        raise ValueError(f"{planned.of.base.root} is no pipeline")
    return planned.of.base.pipeline


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
    """README.md of the merged pipeline, with the front matter that model hubs read."""
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

"""Outputs of one base written in one go, whether it is one model or a pipeline: none appears before all are finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...checkpoints.open_gguf import check_ending
from ...checkpoints.pipeline import PIPELINE_RECEIPT, Pipeline
from ...checkpoints.receipt import RECEIPT_NAME, sealed
from ...engine.merge_outputs import Before, merge_outputs
from ...engine.modelcard import write_card
from ...engine.report import MergeReport, peak_memory
from ...engine.sources import Sources
from ...errors import CheckpointError
from ...files.atomic.checks import require_space
from ...files.atomic.durable import remove_tree, write_text
from ...files.progress import Progress
from ...files.regular import sha256_of
from ...options import RunOptions
from ...version import __version__
from ..components import Planned, joined_proofs
from ..together import together
from .beside import copy_rest, pipeline_card
from .staged import StagedPipeline, begin


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
    with ExitStack() as stack:
        staged = [begin(planned, out, run, progress, stack) for planned, out in outputs]
        require_space(outputs[0][1], sum(each.needed for each in staged))
        for name in pipeline.models:
            _merge(name, [each for each in staged if name in each.left], run, progress)
        for each in staged:
            _complete(each, progress, run.command)
        reports = [_report(each) for each in staged]
        if before is not None:
            before([(report, each.folder.path) for report, each in zip(reports, staged, strict=True)])
        for each in staged:
            each.folder.commit()
    seconds = time.monotonic() - started
    return [replace(report, seconds=seconds) for report in reports]


def _merge(name: str, several: Sequence[StagedPipeline], run: RunOptions, progress: Progress) -> None:
    """Write the component `name` of each of `several`, and put it in its place."""
    if not several:
        return
    wanted: dict[Path, Sources] = {}
    for each in several:
        component, plan = next(part for part in each.planned.parts if part[0].name == name)
        adapters = [weighted.adapter for weighted in component.adapters]
        wanted[each.aside / name] = Sources(plan, component.checkpoint, adapters)
    base, undo = several[0].planned.of.base, several[0].undo.file(name)
    alone = replace(run, overwrite=undo is not None and run.overwrite, restart=False, command=None, undo=undo)
    try:
        reports = merge_outputs(base.folder(name), wanted, alone, progress)
    except BaseException as error:
        if hasattr(error, "__notes__"):
            error.__notes__.clear()  # what was finished of this component is kept with the pipeline, or goes with it
        raise
    for each, report in zip(several, reports, strict=True):
        each.put(name, report, proven=run.verify)


def _complete(staged: StagedPipeline, progress: Progress, command: str | None) -> None:
    """Put beside the components what is copied, the receipt and the model card."""
    remove_tree(staged.aside)
    folder, names = staged.folder.path, staged.names
    hashes = copy_rest(staged.copied, folder, staged.linked, progress)
    receipts = {name: sha256_of(folder / name / RECEIPT_NAME, error=CheckpointError) for name in names}
    left_out, overlay = list(staged.planned.of.left_out), {"only_changed": True} if staged.only_changed else {}
    receipt = {"version": __version__, "components": receipts, "files": hashes, "left_out": left_out, **overlay}
    write_text(folder / PIPELINE_RECEIPT, sealed(receipt))
    write_card(folder, pipeline_card(staged.pipeline, staged.planned.of.given, names, command), PIPELINE_RECEIPT)


def _report(staged: StagedPipeline) -> MergeReport:
    reports = {name: staged.reports[name] for name in staged.names}
    proofs = {name: report.proof for name, report in reports.items() if report.proof is not None}
    return MergeReport(
        out=str(staged.out),
        plan=staged.planned.joined(),
        kept={f"{name}/{tensor}": kept for name, report in reports.items() for tensor, kept in report.kept.items()},
        nbytes=sum(report.nbytes for report in reports.values()),
        seconds=0.0,
        seconds_verifying=sum(report.seconds_verifying for report in reports.values()),
        peak_memory=peak_memory(),
        proof=joined_proofs(proofs) if proofs else None,
        notes=(
            *staged.folder.notes,
            *staged.notes,
            *(f"{name}: {note}" for name, report in reports.items() for note in report.notes),
            *staged.unlinked,
        ),
        undo=None if staged.undo.path is None else str(staged.undo.path),
        undo_bytes=staged.undo.nbytes,
        linked=(*(f"{name}/{file}" for name, report in reports.items() for file in report.linked), *staged.linked),
    )

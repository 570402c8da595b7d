"""A pipeline that is being written, in its hidden folder, and what of it a run that was stopped has left.

A component is merged in a folder aside, which holds what is not whole yet, and moved to its place when it is; the journal of the
pipeline has a line for each. So the run that follows takes the components that are whole, and of the one that was begun its files.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoints.pipeline import Pipeline, files_apart
from ...checkpoints.receipt import RECEIPT_NAME
from ...engine.proof import Proof
from ...engine.report import MergeReport, peak_memory
from ...engine.resume import is_of, journal_fields
from ...errors import CheckpointError, LorafoldError, printable
from ...files.atomic.durable import keep_only
from ...files.atomic.folder import StagedFolder
from ...files.atomic.journal import JOURNAL_NAME, Finished, begin_journal, finished_names, journal_finished, read_journal
from ...files.atomic.owner import OWNER_NAME
from ...files.progress import Progress
from ...files.regular import sha256_of, state_of
from ...kernel.stats import Kept
from ...options import RunOptions
from ...planning.output_files import nbytes
from ...planning.plan import MergePlan
from ..components import Planned
from ..verifying import component_as_written
from .beside import link_weights
from .undo_folder import UndoFolder

_ASIDE = ".components"


@dataclass(frozen=True)
class StagedPipeline:
    """An output that is being made.

    - `planned`: what it will hold; `out`: where it will be
    - `folder`: the hidden one; `undo`: of its undo files
    - `fields`: all that decides it, for its journal
    - `linked`, `unlinked`: files that are the base's own, and in words why others are not
    - `reports`: of the components that are whole, by name; `notes`: what was found of an earlier run, in words
    """

    planned: Planned
    out: Path
    folder: StagedFolder
    undo: UndoFolder
    fields: Mapping[str, Any]
    linked: list[str] = field(default_factory=list)
    unlinked: list[str] = field(default_factory=list)
    reports: dict[str, MergeReport] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def pipeline(self) -> Pipeline:
        """The base."""
        return pipeline_of(self.planned)

    @property
    def names(self) -> tuple[str, ...]:
        """The components that change."""
        return tuple(component.name for component in self.planned.of.components)

    @property
    def left(self) -> list[str]:
        """Those of them that are not whole yet."""
        return [name for name in self.names if name not in self.reports]

    @property
    def only_changed(self) -> bool:
        """Whether it holds the tensors that change, and nothing else."""
        return any(plan.options.only_changed for plan in self.planned.plans)

    @property
    def copied(self) -> dict[str, Path]:
        """The files that belong to none of the components that change."""
        return {} if self.only_changed else files_apart(self.pipeline, self.names)

    @property
    def aside(self) -> Path:
        """Where components are made: a merge locks the folder that it writes in, which the staged one is already."""
        return self.folder.path / _ASIDE

    @property
    def needed(self) -> int:
        """Bytes that are to be written."""
        weights = sum(part.checkpoint.nbytes for part in self.planned.of.components if part.name in self.left)
        return weights + sum(path.stat().st_size for name, path in self.copied.items() if name not in self.linked)

    def plan(self, name: str) -> MergePlan:
        """The plan of the component `name`."""
        return next(plan for part, plan in self.planned.parts if part.name == name)

    def put(self, name: str, report: MergeReport, *, proven: bool) -> None:
        """Move the component `name`, which is whole, from aside to its place, and note that in the journal."""
        (self.aside / name / "README.md").unlink()  # the pipeline has one
        os.rename(self.aside / name, self.folder.path / name)
        self.reports[name] = report
        kept = {tensor: each.numbers for tensor, each in report.kept.items()}
        journal_finished(self.folder.path, _finished(self.folder.path, name, kept, proven=proven))

    def take_over(self, run: RunOptions, progress: Progress) -> None:
        """Count the components that an earlier run left whole, and remove what else it left but for what is aside."""
        path, journal = self.folder.path, read_journal(self.folder.path)
        entries = {} if journal is None else {name: each for name, each in journal.finished.items() if name in self.names}
        whole: list[Finished] = []
        for name, entry in entries.items():
            holds, proof = _held_to(entry, path / name, run, progress)
            if holds and self.undo.has(name):
                self.reports[name] = self._report_again(name, entry, proof)
                whole.append(entry)
            else:
                self.notes.append(f"{printable(name)}, finished by a run that was stopped, has changed since: made again")
        keep_only(path, {OWNER_NAME, JOURNAL_NAME, _ASIDE, *self.reports})
        if whole:
            self.notes.insert(0, f"went on where a run was stopped: {len(whole)} of {len(self.names)} components were finished")
        begin_journal(path, self.fields, whole)
        self.aside.mkdir(exist_ok=True)

    def _report_again(self, name: str, entry: Finished, proof: Proof | None) -> MergeReport:
        plan, folder, base = self.plan(name), self.folder.path / name, self.pipeline.root / name
        return MergeReport(
            out=str(folder),
            plan=plan,
            kept={tensor: Kept.of(numbers) for tensor, numbers in entry.kept.items()},
            nbytes=sum(nbytes(step) for shard in plan.shards for step in shard.steps),
            seconds=0.0,
            seconds_verifying=0.0,
            peak_memory=peak_memory(),
            proof=proof,
            linked=tuple(file for file in sorted(os.listdir(folder)) if _is_same(folder / file, base / file)),
        )


def begin(planned: Planned, out: Path, run: RunOptions, progress: Progress, stack: ExitStack) -> StagedPipeline:
    """The output, whose hidden folder is there until `stack` is left, with what an earlier run finished of it."""
    fields = _fields(planned, run)
    inputs = [planned.of.base.root, *(weighted.adapter.path for weighted in planned.of.given)]
    reuse = partial(is_of, fields=fields, restart=run.restart, worth_keeping=_worth_keeping)
    undo = stack.enter_context(UndoFolder(run, out, inputs, planned))
    folder = stack.enter_context(
        StagedFolder(out, overwrite=run.overwrite, inputs=inputs, linked=run.link, reuse=reuse, worth_keeping=_worth_keeping)
    )
    undo.follow(folder)
    staged = StagedPipeline(planned, out, folder, undo, fields)
    staged.take_over(run, progress)
    if run.link:
        linked, unlinked = link_weights(staged.copied, folder.path)
        staged.linked.extend(linked)
        staged.unlinked.extend(unlinked)
    return staged


def pipeline_of(planned: Planned) -> Pipeline:
    """The pipeline that `planned` is for."""
    if planned.of.base.pipeline is None:
        raise ValueError(f"{planned.of.base.root} is no pipeline")
    return planned.of.base.pipeline


def _fields(planned: Planned, run: RunOptions) -> dict[str, Any]:
    """What decides every bit of the output, by the names that an error calls them."""
    fields: dict[str, Any] = {}
    for component, plan in planned.parts:
        for name, value in journal_fields(plan, component.checkpoint).items():
            fields[f"{component.name}: {name}" if name.startswith(("base file", "plan")) else name] = value
    return {**fields, "components": [component.name for component in planned.of.components], "link": run.link}


def _worth_keeping(folder: Path) -> Collection[str]:
    """What a run of the same command can use of the hidden folder of a pipeline."""
    aside = folder / _ASIDE
    begun = sorted(os.listdir(aside)) if aside.is_dir() else ()
    used = any(finished_names(aside / name) for name in begun)
    return [*finished_names(folder), *([_ASIDE] if used else ())]


def _finished(folder: Path, name: str, kept: Mapping[str, Sequence[float]], *, proven: bool) -> Finished:
    digest = sha256_of(folder / name / RECEIPT_NAME, error=CheckpointError)
    return Finished(name, digest, proven, {tensor: tuple(each) for tensor, each in kept.items()}, _states(folder / name))


def _states(folder: Path) -> list[int]:
    """The states of all files of a component, one after the other."""
    return [number for name in sorted(os.listdir(folder)) for number in state_of(folder / name, error=CheckpointError)]


def _held_to(entry: Finished, folder: Path, run: RunOptions, progress: Progress) -> tuple[bool, Proof | None]:
    """Whether the component has the bytes that it was finished with, and the proof of it.

    That goes by its receipt, or, where nothing was or is to be proven, by the states of its files.
    """
    try:
        if sha256_of(folder / RECEIPT_NAME, error=CheckpointError) != entry.digest:
            return False, None
        if entry.proven:
            proof = component_as_written(folder, progress)
            return proof.ok, proof
        return not run.verify and _states(folder) == list(entry.state), None
    except (LorafoldError, OSError):
        return False, None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False

"""From plans to outputs in their places: stage, check, run, prove, and only then appear.

Several outputs of one base are written in one go; each is whole or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.reader import check_numbers
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.receipt import RECEIPT_NAME, receipt_text
from ..files.atomic.checks import require_space
from ..files.atomic.durable import write_text
from ..files.atomic.folder import StagedFolder
from ..files.atomic.journal import Finished, begin_journal, journal_finished
from ..files.progress import Progress
from ..kernel.stats import Kept
from ..options import RunOptions
from ..planning.plan import MergePlan, PlannedShard
from ..planning.shards import nbytes
from .hashes import hashes_beside, tensor_hashes
from .make_receipt import make_receipt
from .memory import threads_within
from .modelcard import model_card, write_card
from .output import Output
from .proof import Proof
from .prove_while_writing import Proofs
from .report import MergeReport, peak_memory
from .resume import is_of, journal_fields, still_whole
from .sidecars import write_beside
from .sources import Sources
from .unchanged_files import Whole, take_whole
from .undofile.changed import check_undoable
from .undofile.session import Undoing
from .write import run


@dataclass(frozen=True)
class Job:
    """One output: what is done by `plan` with `adapters`, in the folder `out`; `undo`: the file that takes it back, or None."""

    plan: MergePlan
    adapters: tuple[Adapter, ...]
    out: Path
    undo: str | os.PathLike[str] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the output."""
        return _nbytes(self.plan.shards)


@dataclass(frozen=True, eq=False)
class _Begun:
    """A job whose hidden folder is there.

    - `done`: what an earlier run left whole there; `whole`: what need not be written
    - `fields`: of its journal
    """

    job: Job
    staged: StagedFolder
    undoing: Undoing
    sources: Sources
    done: Mapping[str, Finished]
    whole: Whole
    notes: tuple[str, ...]
    fields: Mapping[str, Any]


def write(base: Path, checkpoint: Checkpoint, jobs: Sequence[Job], how: RunOptions, progress: Progress) -> list[MergeReport]:
    """Write the outputs of all `jobs`, which have the same base; a report for each.

    None appears before all are finished, on disk and, with `how.verify`, proven.

    Raises as `merge` does.
    """
    started = time.monotonic()
    threads = _threads(checkpoint, jobs, how)
    for job in jobs:
        if job.undo is not None:
            check_undoable(job.plan, checkpoint)
    with ExitStack() as stack:
        begun = [_begin(base, checkpoint, job, how, stack) for job in jobs]
        require_space(jobs[0].out, sum(_left(each) for each in begun))
        for adapter in {each.sha256: each for job in jobs for each in job.adapters}.values():
            check_numbers(adapter)
        for each in begun:
            begin_journal(each.staged.path, each.fields, each.done.values())
            stack.enter_context(each.sources)
        size = sum(_left(each) + (_unproven(each) if how.verify else 0) for each in begun)
        with progress.phase("merge", size) as advance:
            proofs = [
                Proofs(each.sources, each.staged.path, str(each.job.out), each.done, threads=threads) if how.verify else None
                for each in begun
            ]
            outputs = [
                Output(
                    each.sources,
                    each.staged.path,
                    {**each.whole.files, **each.done},
                    None if proof is None else proof.check,
                    hashed=each.job.undo is not None,
                    on_finished=partial(journal_finished, each.staged.path),
                )
                for each, proof in zip(begun, proofs, strict=True)
            ]
            finished = run(outputs, threads=threads, on_bytes=advance, one_at_a_time=how.max_memory is not None)
        reports = [
            _conclude(each, files, proof, how, threads, progress)
            for each, files, proof in zip(begun, finished, proofs, strict=True)
        ]
        with progress.phase("sync", 0):
            for each in begun:
                each.undoing.commit()
    seconds = time.monotonic() - started
    return [replace(report, seconds=seconds, peak_memory=peak_memory()) for report in reports]


def _threads(checkpoint: Checkpoint, jobs: Sequence[Job], how: RunOptions) -> int | None:
    """How many compute; None: one a processor."""
    if how.max_memory is None:
        return how.threads
    limit = how.max_memory // len(jobs)
    fit = min(threads_within(Sources(job.plan, checkpoint, job.adapters), limit) for job in jobs)
    return fit if how.threads is None else min(fit, how.threads)


def _begin(base: Path, checkpoint: Checkpoint, job: Job, how: RunOptions, stack: ExitStack) -> _Begun:
    fields = {**journal_fields(job.plan, checkpoint), "link": how.link}  # the same bytes, but not what was asked for
    inputs = [base, *(adapter.path for adapter in job.adapters)]
    reuse = partial(is_of, fields=fields, restart=how.restart)
    staged = stack.enter_context(StagedFolder(job.out, overwrite=how.overwrite, inputs=inputs, reuse=reuse, linked=how.link))
    undoing = stack.enter_context(Undoing(job.undo, staged, fields))
    done, notes = still_whole(staged.path, job.plan)
    whole = take_whole(staged.path, job.plan, checkpoint, done, link=how.link)
    notes += whole.notes
    return _Begun(job, staged, undoing, Sources(job.plan, checkpoint, job.adapters), done, whole, tuple(notes), fields)


def _left(begun: _Begun) -> int:
    """Bytes of tensors that are still to be written."""
    return _nbytes(shard for shard in begun.job.plan.shards if shard.name not in {**begun.whole.files, **begun.done})


def _unproven(begun: _Begun) -> int:
    """Bytes of tensors that are still to be proven."""
    proven = {name for name, entry in begun.done.items() if entry.proven}
    return _nbytes(shard for shard in begun.job.plan.shards if shard.name not in proven)


def _nbytes(shards: Iterable[PlannedShard]) -> int:
    return sum(nbytes(step) for shard in shards for step in shard.steps)


def _conclude(
    begun: _Begun, finished: Mapping[str, Finished], proofs: Proofs | None, how: RunOptions, threads: int | None, progress: Progress
) -> MergeReport:
    """Write what stands beside the weights, receipt and undo file, and prove the whole; the report, but for time and memory."""
    job, folder, checkpoint = begun.job, begun.staged.path, begun.sources.checkpoint
    beside = write_beside(folder, job.plan, checkpoint, job.adapters)
    proof: Proof | None = None if proofs is None else proofs.conclude()
    kept = {name: Kept.of(numbers) for entry in finished.values() for name, numbers in entry.kept.items()}
    names = [shard.name for shard in job.plan.shards]
    hashes = {name: finished[name].sha256 for name in names if finished[name].sha256}
    receipt = make_receipt(job.plan, checkpoint, kept, hashes, hashes_beside(folder, names))
    if how.hash_tensors:
        with progress.phase("hash", job.nbytes) as advance:
            shards = open_checkpoint(folder).shards
            receipt = replace(receipt, tensor_hashes=tensor_hashes(shards, threads=threads, on_bytes=advance))
    write_text(folder / RECEIPT_NAME, receipt_text(receipt))
    write_card(folder, model_card(job.plan, checkpoint, how.command))
    undo_bytes = begun.undoing.write(begun.sources, receipt, verify=how.verify, threads=threads, progress=progress)
    return MergeReport(
        out=str(job.out),
        plan=job.plan,
        kept=kept,
        nbytes=job.nbytes,
        seconds=0.0,
        seconds_verifying=proofs.seconds if proofs is not None else 0.0,
        peak_memory=0,
        proof=proof,
        notes=(*checkpoint.notes, *begun.staged.notes, *begun.notes, *beside),
        undo=None if job.undo is None else str(job.undo),
        undo_bytes=undo_bytes,
        linked=begun.whole.linked,
    )

"""From plans to outputs in their places: stage, check, run, prove, and only then appear.

Several outputs of one base are written in one go; each is whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..adapters.numbers import check_numbers
from ..checkpoints.open import open_checkpoint
from ..checkpoints.receipt import RECEIPT_NAME, receipt_text
from ..files.atomic.checks import require_space
from ..files.atomic.durable import write_text
from ..files.atomic.file_of_folder import staging
from ..files.atomic.journal import begin_journal
from ..files.digests import new_digest
from ..files.progress import LOG, Progress
from ..kernel.stats import Kept
from ..options import RunOptions
from ..planning.decomposition import decomposition_notes
from .file_heads import put_receipt
from .hashes import hashes_beside, tensor_hashes
from .make_receipt import make_receipt
from .memory import threads_within
from .modelcard import model_card, write_card
from .outputs import Output
from .report import MergeReport, check_codes, peak_memory
from .resume import is_of, journal_fields, still_whole
from .sidecars import files_beside, write_beside
from .sources import Sources
from .unchanged_files import take_unchanged
from .undofile.base_heads import check_padding
from .undofile.changed import check_undoable
from .undofile.session import Undoing
from .write import run

Before = Callable[[Sequence[tuple[MergeReport, Path]]], None]
"""Told, before the first of several outputs appears, of each its report and the hidden folder in which it is whole."""


def merge_outputs(
    base: Path, wanted: Mapping[Path, Sources], how: RunOptions, progress: Progress, before: Before | None = None
) -> list[MergeReport]:
    """Write an output to each path of `wanted`, of plans for the same base, which is at `base`; a report for each.

    None appears before all are finished, on disk and, with `how.verify`, proven. `how.undo` is for one output.

    Raises as `merge` does.
    """
    started = time.monotonic()
    for note in dict.fromkeys(note for sources in wanted.values() for note in decomposition_notes(sources.plan.steps)):
        LOG.warning("%s", note)
    new_digest(how.hash)  # which may not be installed
    how = replace(how, threads=_threads(wanted.values(), how))
    for sources in wanted.values():
        if how.undo is not None:
            check_undoable(sources.plan, sources.checkpoint)
            for shard in sources.checkpoint.shards:
                check_padding(shard)
        if not sources.plan.options.only_changed and sources.checkpoint.gguf is None:
            files_beside(
                sources.checkpoint, sources.adapters, sources.plan.files_dropped
            )  # which may refuse, and should before anything is written
    with ExitStack() as stack:
        outputs = [_staged(base, out, sources, how, stack) for out, sources in wanted.items()]
        require_space(outputs[0].out, sum(output.left for output in outputs))
        for adapter in {each.sha256: each for sources in wanted.values() for each in sources.adapters}.values():
            check_numbers(adapter)
        with ExitStack() as reading:
            for output in outputs:
                begin_journal(output.folder, output.fields, output.earlier.values())
                reading.enter_context(output.sources)
            with progress.phase("merge", sum(output.left + output.unproven for output in outputs)) as advance:
                run(outputs, threads=how.threads, on_bytes=advance, one_at_a_time=how.max_memory is not None)
            reports = [_conclude(output, how, progress) for output in outputs]
        if before is not None:
            before([(report, output.folder) for report, output in zip(reports, outputs, strict=True)])
        with progress.phase("sync", 0):
            for output in outputs:
                output.undoing.commit()
    seconds = time.monotonic() - started
    return [replace(report, seconds=seconds, peak_memory=peak_memory()) for report in reports]


def _threads(wanted: Collection[Sources], how: RunOptions) -> int | None:
    """How many compute; None: one per CPU."""
    if how.max_memory is None:
        return how.threads
    fit = min(threads_within(sources, how.max_memory // len(wanted)) for sources in wanted)
    return fit if how.threads is None else min(fit, how.threads)


def _staged(base: Path, out: Path, sources: Sources, how: RunOptions, stack: ExitStack) -> Output:
    """The output, whose hidden folder is there until `stack` is left, with what need not be written."""
    plan, checkpoint = sources.plan, sources.checkpoint
    fields = {**journal_fields(plan, checkpoint), "link": how.link}  # the same bytes, but not what was asked for
    inputs = [base, *(adapter.path for adapter in sources.adapters)]
    inputs += [] if checkpoint.gguf is None else [shard.path for shard in checkpoint.shards]
    reuse = partial(is_of, fields=fields, restart=how.restart)
    staged = stack.enter_context(staging(out)(out, overwrite=how.overwrite, inputs=inputs, reuse=reuse, linked=how.link))
    undoing = stack.enter_context(Undoing(how.undo, staged, fields))
    earlier, notes = still_whole(staged.path, plan)
    unchanged = take_unchanged(staged.path, plan, checkpoint, earlier, link=how.link)
    return Output(
        sources=sources,
        out=out,
        staged=staged,
        undoing=undoing,
        fields=fields,
        earlier=earlier,
        unchanged=unchanged,
        notes=(*notes, *unchanged.notes),
        verify=how.verify,
        algorithm=how.hash,
        threads=how.threads,
    )


def _conclude(output: Output, how: RunOptions, progress: Progress) -> MergeReport:
    """Write what stands beside the weights, receipt and undo file, and prove the whole; the report, but for time and memory."""
    sources, plan, folder = output.sources, output.plan, output.folder
    checkpoint = sources.checkpoint
    beside = write_beside(folder, plan, checkpoint, sources.adapters)
    proof = output.conclude() if how.verify else None
    kept = {name: Kept.of(numbers) for entry in output.finished.values() for name, numbers in entry.kept.items()}
    check_codes(plan, kept)
    names = [shard.name for shard in plan.shards]
    hashes = {name: output.finished[name].digest for name in names if output.finished[name].digest}
    receipt = make_receipt(plan, checkpoint, kept, hashes, hashes_beside(folder, names) if checkpoint.gguf is None else {})
    if how.hash_tensors:
        with progress.phase("hash", output.nbytes) as advance:
            shards = open_checkpoint(output.place).shards
            receipt = replace(receipt, tensor_hashes=tensor_hashes(shards, threads=how.threads, on_bytes=advance))
    write_text(folder / RECEIPT_NAME, receipt_text(receipt))
    if checkpoint.gguf is None:
        write_card(folder, model_card(plan, checkpoint, how.command))
    else:
        put_receipt(output.place, receipt_text(receipt))
    undo_bytes = output.undoing.write(sources, receipt, verify=how.verify, threads=how.threads, progress=progress)
    return MergeReport(
        out=str(output.out),
        plan=plan,
        kept=kept,
        nbytes=output.nbytes,
        seconds=0.0,
        seconds_verifying=sum(output.seconds),
        peak_memory=0,
        proof=proof,
        notes=(*checkpoint.notes, *output.staged.notes, *output.notes, *beside),
        undo=None if how.undo is None else str(how.undo),
        undo_bytes=undo_bytes,
        linked=output.unchanged.linked,
    )

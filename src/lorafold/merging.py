"""The whole road in one call: open, plan, run, prove, and only then appear.

`merge` and `verify` are the public faces of the rooms below; nothing here touches a number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from .adapters import Adapter, WeightedAdapter, check_numbers, load_adapter
from .checkpoint import (
    Checkpoint,
    Finished,
    StagedFolder,
    begin_journal,
    journal_finished,
    open_checkpoint,
    require_space,
    write_json,
)
from .errors import CheckpointError, PlanError, VerificationError, printable
from .execute import is_of, journal_fields, run, still_whole, write_beside
from .kernel import Kept, Precision
from .planning import MergeOptions, MergePlan, make_plan, nbytes
from .progress import Progress, Quiet
from .proving import Proof, Proofs, make_receipt, prove, receipt_failures
from .receipt import RECEIPT_NAME, Receipt, read_receipt
from .report import MergeReport, peak_memory
from .steps import Sources

AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | WeightedAdapter


def plan(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    *,
    precision: Precision = "exact",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    merge_again: bool = False,
) -> MergePlan:
    """What `merge` with the same arguments would do: pure data, nothing written.

    Raises as `merge` does, but for what only the numbers show.
    """
    options = MergeOptions(precision, rounding, seed, dtype, max_shard_size)
    return make_plan(open_checkpoint(Path(base)), weighted(adapters), options, merge_again=merge_again)


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    out: str | os.PathLike[str],
    *,
    precision: Precision = "exact",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    merge_again: bool = False,
    restart: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    command: str | None = None,
) -> MergeReport:
    """Write `base` with `adapters` folded into its weights to the folder `out`, and report.

    - `base`: a folder of .safetensors files with or without an index, a hub-cache snapshot, or one file
    - `adapters`: paths, or (path, weight); they are summed before the one rounding
    - `precision`, `rounding`: see `lorafold.merge_weight`; `seed` is stochastic rounding's
    - `dtype`: ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"`` for all floating tensors; by default each keeps its own
    - `max_shard_size`: bytes a file; by default the base's division into files is kept
    - `verify`: read everything back and prove it before it appears
    - `restart`: begin anew where a merge to `out` was stopped; by default it is gone on with, if it was this very merge
    - `overwrite`: replace a checkpoint at `out`; `merge_again`: allow an adapter that the base's receipt lists
    - `progress`: told of bytes as they are written and proven; `command`: for the model card

    `out` appears by one rename when everything is written, on disk and, with `verify`, proven; on any error nothing is there.
    Finished files of a merge that was stopped stay in a hidden folder beside `out`, and the same call goes on from there.

    Raises `InputError` of the kind that fits, `OutputError`, `VerificationError`.
    """
    started = time.monotonic()
    progress = progress or Quiet()
    checkpoint, chosen = open_checkpoint(Path(base)), weighted(adapters)
    options = MergeOptions(precision, rounding, seed, dtype, max_shard_size)
    merge_plan = make_plan(checkpoint, chosen, options, merge_again=merge_again)
    parts = [each.adapter for each in chosen]
    inputs = [Path(base), *(part.path for part in parts)]
    fields = journal_fields(merge_plan, checkpoint)
    reuse = partial(is_of, fields=fields, restart=restart)
    with StagedFolder(Path(out), overwrite=overwrite, inputs=inputs, reuse=reuse) as staged:
        done, notes = still_whole(staged.path, merge_plan)
        staged.keep |= done.keys()
        size = sum(nbytes(step) for step in merge_plan.steps)
        require_space(Path(out), size - sum((staged.path / name).stat().st_size for name in done))
        for part in parts:
            check_numbers(part)
        if not done:
            begin_journal(staged.path, fields)
        with Sources(merge_plan, checkpoint, parts) as sources:

            def keep(entry: Finished) -> None:
                journal_finished(staged.path, entry)
                staged.keep.add(entry.name)

            with progress.phase("merge", size * 2 if verify else size) as advance:
                proofs = Proofs(sources, staged.path, str(out), done, on_bytes=advance) if verify else None
                check = None if proofs is None else proofs.check
                finished = run(sources, staged.path, done=done, check=check, on_finished=keep, on_bytes=advance)
            beside = write_beside(staged.path, merge_plan, checkpoint, parts, command=command)
            proof = None if proofs is None else proofs.conclude()
        kept = {name: Kept(*pair) for entry in finished.values() for name, pair in entry.kept.items()}
        files = {name: entry.sha256 for name, entry in finished.items()}
        receipt = make_receipt(merge_plan, checkpoint, kept, files)
        write_json(staged.path / RECEIPT_NAME, receipt.to_json())
        with progress.phase("sync", 0):
            staged.commit()
    return MergeReport(
        out=str(out),
        plan=merge_plan,
        kept=kept,
        nbytes=size,
        seconds=time.monotonic() - started,
        seconds_verifying=proofs.seconds if proofs is not None else 0.0,
        peak_memory=peak_memory(),
        proof=proof,
        notes=(*staged.notes, *notes, *beside),
    )


def verify(
    out: str | os.PathLike[str],
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    *,
    progress: Progress | None = None,
) -> Proof:
    """The proof that `out` is `base` with `adapters` folded in, as its receipt says they were.

    Precision, rounding, seed and dtype are the receipt's. What does not hold is in the proof's `failures`; `Proof.require`
    turns them into an error.

    Raises `InputError` of the kind that fits where something cannot be read at all, `VerificationError` where `out` has no receipt.
    """
    progress = progress or Quiet()
    output, receipt = _open_output(Path(out))
    checkpoint, chosen = open_checkpoint(Path(base)), weighted(adapters)
    options = MergeOptions(receipt.precision, receipt.rounding, receipt.seed, receipt.dtype)
    merge_plan = make_plan(checkpoint, chosen, options, merge_again=True)
    with Sources(merge_plan, checkpoint, [each.adapter for each in chosen]) as sources:
        size = output.nbytes
        with progress.phase("verify", size) as advance:
            proof = prove(output, sources, on_bytes=advance)
    return replace(proof, failures=(*proof.failures, *receipt_failures(receipt, merge_plan, checkpoint, proof)))


def _open_output(out: Path) -> tuple[Checkpoint, Receipt]:
    """The merged checkpoint at `out` and its receipt. One that cannot be read any more is one that does not hold."""
    if not (out / RECEIPT_NAME).exists():
        open_checkpoint(out)  # where it is no checkpoint at all, this says so
        raise VerificationError(
            f"{printable(str(out))} has no {RECEIPT_NAME}: how it was rounded is not known", hint="was it made by lorafold merge?"
        )
    try:
        receipt = read_receipt(out)
        output = open_checkpoint(out)
    except CheckpointError as error:
        raise VerificationError(error.message, hint="do not use it: merge again") from error
    if receipt is None:
        raise VerificationError(f"{printable(str(out))} has no {RECEIPT_NAME}")
    return output, receipt


def weighted(adapters: Sequence[AdapterLike]) -> list[WeightedAdapter]:
    """The adapters at paths, with the weights given beside them."""
    if isinstance(adapters, str | os.PathLike):
        raise PlanError(f"adapters must be a list of paths, not the path {printable(str(adapters))}")
    return [_weighted(each) for each in adapters]


def _weighted(given: AdapterLike | Adapter) -> WeightedAdapter:
    if isinstance(given, WeightedAdapter):
        return given
    if isinstance(given, Adapter):
        return WeightedAdapter(given)
    path, weight = given if isinstance(given, tuple) else (given, 1.0)
    return WeightedAdapter(load_adapter(path), weight)

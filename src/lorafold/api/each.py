"""`merge_each`: one base, several adapters, an output for each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ..adapters.adapter import WeightedAdapter
from ..adapters.options import ReadOptions
from ..checkpoints.open import open_checkpoint
from ..checkpoints.pipeline import is_pipeline
from ..engine.job import How, Job, write
from ..engine.report import MergeReport
from ..errors import PlanError, printable
from ..files.progress import Progress, Quiet
from ..files.safetensors.dtypes import dtype_name
from ..kernel.merge import Precision
from ..planning.make import make_plan
from ..planning.plan import MergeOptions
from .loading import AdapterLike, weighted


def merge_each(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    folder: str | os.PathLike[str],
    *,
    precision: Precision = "exact",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | None = None,
    on_overflow: Literal["error", "clamp"] = "error",
    allow_nonfinite_base: bool = False,
    only_changed: bool = False,
    merge_again: bool = False,
    allow_partial: bool = False,
    strict_base: bool = False,
    prefer: Literal["index", "single"] | None = None,
    repair_index: bool = False,
    read_options: ReadOptions | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    hash_tensors: bool = False,
    link: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> list[MergeReport]:
    """Write `base` with each of `adapters` alone folded into its weights, to a folder in `folder` that has the adapter's name.

    What `merge` would write one by one, in one reading of the base: a block of it is read once for all. Options are `merge`'s.
    No output appears before all are finished, and proven unless `verify` is False.

    Raises as `merge` does, and `PlanError` where two adapters have the same name, or the base is a pipeline.
    """
    if is_pipeline(Path(base)):
        raise PlanError(f"{printable(str(base))} is a pipeline, whose components are merged one by one", hint="merge each alone")
    checkpoint = open_checkpoint(Path(base), prefer=prefer, repair_index=repair_index)
    options = MergeOptions(
        precision, rounding, seed, dtype_name(dtype), max_shard_size, on_overflow, allow_nonfinite_base, only_changed
    )
    chosen = weighted(adapters, checkpoint, read_options)
    if not chosen:
        raise PlanError("there is no adapter to merge")
    outs = _outs(Path(folder), chosen)
    jobs = []
    for each, out in zip(chosen, outs, strict=True):
        plan = make_plan(checkpoint, [each], options, merge_again=merge_again, allow_partial=allow_partial, strict_base=strict_base)
        jobs.append(Job(plan, (each.adapter,), out))
    how = How(overwrite, restart, verify, hash_tensors, link, max_memory, threads, progress or Quiet(), command)
    return write(Path(base), checkpoint, jobs, how)


def _outs(folder: Path, chosen: Sequence[WeightedAdapter]) -> list[Path]:
    """The output of each adapter."""
    if not folder.is_dir():
        raise PlanError(
            f"{printable(str(folder))} is not a folder", hint="it must be there: an output for each adapter is put in it"
        )
    outs = [folder / each.adapter.name for each in chosen]
    double = next((out for i, out in enumerate(outs) if out in outs[:i]), None)
    if double is not None:
        raise PlanError(
            f"two of the adapters are called {printable(double.name)}, and both would be written to {printable(str(double))}",
            hint="rename the folder of one",
        )
    return outs

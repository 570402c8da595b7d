"""`merge` and `plan`: one base, adapters that are summed, one output."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..adapters.adapter import WeightedAdapter
from ..adapters.options import ReadOptions
from ..checkpoints.input_hashes import check_hashes
from ..checkpoints.open import open_checkpoint
from ..checkpoints.pipeline import is_pipeline
from ..engine.job import How, Job, write
from ..engine.report import MergeReport
from ..errors import PlanError, printable
from ..files.progress import Progress, Quiet
from ..files.safetensors.dtypes import dtype_name
from ..kernel.merge import Precision
from ..planning.make import make_plan
from ..planning.plan import MergeOptions, MergePlan
from .loading import AdapterLike, loaded, weighted
from .pipelines.merge import merge_pipeline, plan_pipeline


def plan(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
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
) -> MergePlan:
    """What `merge` with the same arguments would do: pure data, nothing written.

    Raises as `merge` does, but for what only the numbers show.
    """
    if is_pipeline(Path(base)):
        given = {name: value for name, value in locals().items() if name not in ("base", "adapters")}
        component = None if read_options is None else read_options.component
        parts, one = loaded(adapters, read_options), partial(plan, **given)
        return plan_pipeline(Path(base), parts, one, component=component, allow_partial=allow_partial)
    options = MergeOptions(
        precision, rounding, seed, dtype_name(dtype), max_shard_size, on_overflow, allow_nonfinite_base, only_changed
    )
    checkpoint = open_checkpoint(Path(base), prefer=prefer, repair_index=repair_index)
    chosen = weighted(adapters, checkpoint, read_options)
    found = make_plan(checkpoint, chosen, options, merge_again=merge_again, allow_partial=allow_partial, strict_base=strict_base)
    return replace(found, notes=(*checkpoint.notes, *found.notes))


def merge(
    base: str | os.PathLike[str],
    adapters: Sequence[AdapterLike],
    out: str | os.PathLike[str],
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
    expect_sha256: Mapping[str, str] | None = None,
    verify_input: bool = False,
    max_memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    verify: bool = True,
    hash_tensors: bool = False,
    link: bool = False,
    undo: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> MergeReport:
    """Write `base` with `adapters` folded into its weights to the folder `out`, and report.

    - `base`: a folder of .safetensors files with or without an index, a hub-cache snapshot, one file, or a diffusers pipeline
    - `adapters`: paths, or (path, weight); they are summed before the one rounding
    - `precision`, `rounding`: see `lorafold.merge_weight`; `seed` is stochastic rounding's
    - `dtype`: bfloat16, float16, float32 or float64, as ``torch.bfloat16``, ``"bfloat16"`` or ``"BF16"``, of all floating tensors;
      by default each keeps its own
    - `max_shard_size`: bytes a file; by default the base's division into files is kept
    - `on_overflow`: ``"clamp"`` puts the dtype's largest number where a sum is larger, instead of refusing
    - `allow_nonfinite_base`: leave NaN and infinity where a merged base tensor has them, instead of refusing
    - `only_changed`: write the tensors that change, and nothing else of the base: an overlay, which its receipt ties to the base
    - `merge_again`: allow an adapter that the base's receipt lists
    - `allow_partial`: leave out the parts of adapters that the base has no place for; they are listed in report and receipt
    - `strict_base`: refuse an adapter that names another base model
    - `prefer`: which one counts where a folder holds an index with shards and a `model.safetensors`
    - `read_options`: what the files of the adapters cannot tell; for all of them
    - `repair_index`: where the index does not list all that its shards hold, take it in, instead of refusing
    - `expect_sha256`: hashes of input files by name; `verify_input`: also hold blobs of a hub cache to their names
    - `threads`: how many compute, by default one a processor
    - `max_memory`: bytes that the merge may take on top of the interpreter; fewer threads work where that is needed
    - `overwrite`: replace a checkpoint at `out`
    - `restart`: begin anew where a merge to `out` was stopped; by default it is gone on with, if it was this very merge
    - `verify`: read everything back and prove it before it appears; without, the receipt has no hashes either
    - `hash_tensors`: put the sha256 of every tensor into the receipt, beside those of the files
    - `link`: where a whole file of weights would be the base's, byte for byte, make it a hard link and no copy, if the file system
      can: what writes into one of the two changes both, what replaces or removes one does not
    - `undo`: a file to write what `unmerge` needs to give back the base without the base; it appears just before `out`
    - `progress`: told of bytes as they are written and proven; `command`: for the model card

    `out` appears by one rename when everything is written, on disk and, with `verify`, proven; on any error nothing is there.
    Finished files of a merge that was stopped stay in a hidden folder beside `out`, and the same call goes on from there; those
    of a pipeline do not. In a pipeline each component is merged that an adapter has something for, and all else is copied.

    Raises `InputError` of the kind that fits, `OutputError`, `VerificationError`.
    """
    if is_pipeline(Path(base)):
        given = {name: value for name, value in locals().items() if name not in ("base", "adapters", "out")}
        return _merge_pipeline(Path(base), loaded(adapters, read_options), Path(out), given)
    checkpoint = open_checkpoint(Path(base), prefer=prefer, repair_index=repair_index)
    chosen = weighted(adapters, checkpoint, read_options)
    options = MergeOptions(
        precision, rounding, seed, dtype_name(dtype), max_shard_size, on_overflow, allow_nonfinite_base, only_changed
    )
    merge_plan = make_plan(
        checkpoint, chosen, options, merge_again=merge_again, allow_partial=allow_partial, strict_base=strict_base
    )
    if only_changed and undo is not None:
        raise PlanError(
            "an undo file restores a whole checkpoint", hint="beside the tensors that changed the base is all that is needed"
        )
    job = Job(merge_plan, tuple(each.adapter for each in chosen), Path(out), undo)
    if expect_sha256 or verify_input:
        files = [*(shard.path for shard in checkpoint.shards), *(each.header.path for each in job.adapters)]
        check_hashes(files, expect_sha256 or {}, named_by_hash=verify_input)
    how = How(overwrite, restart, verify, hash_tensors, link, max_memory, threads, progress or Quiet(), command)
    return write(Path(base), checkpoint, [job], how)[0]


def _merge_pipeline(base: Path, adapters: Sequence[WeightedAdapter], out: Path, given: Mapping[str, Any]) -> MergeReport:
    """`merge` of each component of the pipeline `base` that `adapters` change, with the options `given`."""
    for name, words in (("undo", "an undo file"), ("expect_sha256", "hashes of input files"), ("only_changed", "only_changed")):
        if given[name]:
            raise PlanError(
                f"{printable(str(base))} is a pipeline, for which {words} cannot be given",
                hint="merge each component alone, its folder being the base",
            )
    alone = {**given, "overwrite": False, "restart": False, "command": None}
    planned = {name: alone[name] for name in inspect.signature(plan).parameters if name in alone}
    return merge_pipeline(
        base,
        adapters,
        out,
        plan=partial(plan, **planned),
        merge=partial(merge, **alone),
        component=None if given["read_options"] is None else given["read_options"].component,
        allow_partial=given["allow_partial"],
        overwrite=given["overwrite"],
        link=given["link"],
        progress=given["progress"] or Quiet(),
        command=given["command"],
    )

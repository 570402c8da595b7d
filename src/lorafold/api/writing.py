"""Outputs of one base written in one go, whether it is one model or a pipeline: none appears before all are finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engine.merge_outputs import merge_outputs
from ..engine.report import MergeReport
from ..engine.sources import Sources
from ..files.progress import Progress
from ..options import RunOptions
from .components import Planned
from .pipelines.merge import write_pipelines


def write_outputs(outputs: Sequence[tuple[Planned, Path]], run: RunOptions, progress: Progress) -> list[MergeReport]:
    """Carry out each of `outputs`, which have the same base, into its folder; a report for each.

    Raises as `merge` does; on any error none of them is there.
    """
    base = outputs[0][0].of.base
    if base.pipeline is not None:
        return write_pipelines(base.pipeline, outputs, run, progress)
    wanted: dict[Path, Sources] = {}
    for planned, out in outputs:
        ((component, plan),) = planned.parts
        wanted[out] = Sources(plan, component.checkpoint, [weighted.adapter for weighted in component.adapters])
    return merge_outputs(base.root, wanted, run, progress)

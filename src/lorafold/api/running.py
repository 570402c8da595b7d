"""`run`: a plan that was made before, and maybe stored as JSON, is carried out as it stands, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters.read_options import ReadOptions
from ..declared import declared
from ..engine.report import MergeReport
from ..errors import PlanError, printable
from ..files import strictjson
from ..files.progress import Watching
from ..options import MatchOptions, RunOptions
from ..planning.plan import MergePlan, plan_from_json
from .merging import merge
from .merging import plan as make_plan
from .verbs import takes, tells

PlanLike = MergePlan | str | os.PathLike[str] | Mapping[str, Any]
"""A plan, its JSON object, or a file that holds that, as ``lorafold plan --json`` prints it."""


@tells
@takes(MatchOptions, RunOptions)
def run(
    plan: PlanLike,
    out: str | os.PathLike[str],
    *,
    read_options: ReadOptions | None = None,
    progress: Watching = None,
    **options: Any,
) -> MergeReport:
    """Write what `plan` says to the folder `out`, and report.

    - `plan`: what `lorafold.plan` returned, its JSON object, or the path of a file with the output of ``lorafold plan --json``
    - `read_options`, `progress`: as for `merge`
    - `**options`: as listed below

    What is computed is the plan's to say; how adapters and base are read must be what it was when the plan was made.
    Base and adapters are looked for where the plan says. It is made anew from them first, and must come out as it stands: what
    someone has read and approved is what is done.

    Raises `PlanError` where it cannot be read, or does not come out the same, which it says by the first difference; and as `merge`
    does.

    >>> import json, lorafold, pathlib
    >>> plan = lorafold.plan("base", [("adapter", 0.5)], dtype="float16")
    >>> _ = pathlib.Path("plan.json").write_text(json.dumps(plan.to_json()))
    >>> lorafold.run("plan.json", "out").plan == plan
    True
    """
    stored = _read(plan)
    held = asdict(stored.options)
    adapters = [(each.path, each.adapter_weight) for each in stored.adapters]
    if stored.original is not None:
        options = {"requantise_from": stored.original.path, **options}
    matching = {name: value for name, value in options.items() if name in declared(MatchOptions)}
    found = make_plan(stored.base, adapters, read_options=read_options, **held, **matching)
    difference = _difference(stored, found)
    if difference is not None:
        raise PlanError(
            f"the plan is not what base and adapters make now: {difference}",
            hint="nothing was written; give the options that it was made with, or make a new plan",
        )
    return merge(stored.base, adapters, out, read_options=read_options, progress=progress, **held, **options)


def _read(plan: PlanLike) -> MergePlan:
    if isinstance(plan, MergePlan):
        return plan
    value = plan if isinstance(plan, Mapping) else strictjson.load(Path(plan), error=PlanError)
    found = plan_from_json(value)
    texts = [found.base, *(each.path for each in found.adapters)]
    weights = [each.adapter_weight for each in found.adapters]
    if not all(isinstance(text, str) for text in texts) or not all(type(weight) in (int, float) for weight in weights):
        raise PlanError("the plan cannot be read: its paths must be text and its weights numbers", hint="make it anew")
    return found


def _difference(stored: MergePlan, found: MergePlan) -> str | None:
    """The first thing in which two plans differ, in words; None where they are equal."""
    if stored.fingerprint != found.fingerprint:
        expected = printable(str(stored.fingerprint))
        return f"{printable(stored.base)} has the fingerprint {found.fingerprint}, expected {expected}"
    for one, other in zip(stored.adapters, found.adapters, strict=True):
        if one != other:
            return f"{printable(one.path)} has sha256 {other.sha256}, expected {printable(str(one.sha256))}"
    for shard, again in zip(stored.shards, found.shards, strict=False):
        if shard.name != again.name:
            return f"the file {printable(str(shard.name))} is now {printable(again.name)}"
        for step, anew in zip(shard.steps, again.steps, strict=False):
            if step != anew:
                return f"{printable(anew.tensor)} comes about in another way"
    return None if stored == found else "there are other tensors or notes, or another configuration"

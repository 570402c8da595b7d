"""``lorafold merge``, ``lorafold merge-each`` and ``lorafold plan``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..api import merging
from ..api.loading import AdapterLike
from ..options import MatchOptions, RunOptions, SumOptions
from ..planning.json import plan_to_json
from .flags import Chosen
from .startup import progress
from .terminal import show_plan, show_report


def merge(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    report = merging.merge(base, adapters, out, progress=progress(), command=_command(), **options)
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show_report(report)


def merge_each(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge each alone, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    reports = merging.merge_each(base, adapters, out, progress=progress(), command=_command(), **options)
    if as_json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        for report in reports:
            show_report(report)


def plan(base: Path, adapters: Sequence[AdapterLike], chosen: Chosen, *, everything: bool, as_json: bool) -> None:
    """Print what a merge would do."""
    found = merging.plan(base, adapters, **chosen.of(SumOptions, MatchOptions))
    if as_json:
        print(json.dumps(plan_to_json(found), indent=2))
    else:
        show_plan(found, everything=everything)


def _command() -> str:
    return shlex.join(["lorafold", *sys.argv[1:]])

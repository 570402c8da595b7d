"""``lorafold merge``, ``lorafold merge-each`` and ``lorafold plan``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..api import merging
from ..api.loading import AdapterLike
from ..options import MatchOptions, RunOptions, SumOptions
from .flags import Chosen
from .startup import progress
from .terminal import show, show_json


def merge(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    report = merging.merge(base, adapters, out, progress=progress(), command=_command(), **options)
    if as_json:
        show_json(report.to_json())
    else:
        show(report.summary())


def merge_each(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge each alone, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    reports = merging.merge_each(base, adapters, out, progress=progress(), command=_command(), **options)
    if as_json:
        show_json([report.to_json() for report in reports])
    else:
        for report in reports:
            show(report.summary())


def plan(base: Path, adapters: Sequence[AdapterLike], chosen: Chosen, *, everything: bool, as_json: bool) -> None:
    """Print what a merge would do."""
    found = merging.plan(base, adapters, **chosen.of(SumOptions, MatchOptions))
    if as_json:
        show_json(found.to_json())
    else:
        show(found.summary(everything=everything))


def _command() -> str:
    return shlex.join(["lorafold", *sys.argv[1:]])

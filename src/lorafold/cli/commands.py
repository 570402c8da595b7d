"""What each command does once its words are read: the verb, and what came of it as text or as JSON.

Imported when a command runs, since it takes torch with it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from ..adapters.options import ReadOptions
from ..api import converting, inspecting, merging, unmerging, verifying
from ..api.loading import AdapterLike
from ..options import ConvertOptions, MatchOptions, RunOptions, SumOptions
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


def verify(out: Path, base: Path | None, adapters: Sequence[AdapterLike], *, as_json: bool) -> None:
    """Prove, and print what was found."""
    if (base is None) != (not adapters):
        option = "--base" if base is None else "--adapter"
        raise typer.BadParameter(f"Missing option {option}: the proof needs both; without either, hashes are compared")
    proof = verifying.verify(out, base, adapters, progress=progress())
    if as_json:
        show_json(proof.to_json())
        if proof.failures:
            raise typer.Exit(3)
        return
    proof.raise_for_failures()
    show(proof.summary())


def unmerge(out: Path, restored: Path, *, base: Path | None, undo: Path | None, overwrite: bool, as_json: bool) -> None:
    """Restore, and say what was."""
    report = unmerging.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, progress=progress())
    if as_json:
        show_json(report.to_json())
    else:
        show(report.summary())


def inspect(path: Path, options: ReadOptions, *, base: Path | None, everything: bool, as_json: bool) -> None:
    """Explain what is at `path`."""
    inspection = inspecting.inspect(path, base, read_options=options)
    if as_json:
        show_json(inspection.to_json())
    else:
        show(inspection.summary(everything=everything))


def convert(adapter: Path, out: Path, to: str, chosen: Chosen, *, base: Path | None, as_json: bool) -> None:
    """Convert, and say what was done."""
    done = converting.convert(adapter, out, to, base=base, read_options=chosen.reading(adapter), **chosen.of(ConvertOptions))
    if as_json:
        show_json(done.to_json())
    else:
        show(done.summary())

"""What each command does once its words are read: the verb, and what came of it as text or as JSON.

Imported when a command runs, since it takes torch with it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..adapters.read_options import ReadOptions
from ..api import converting, inspecting, merging, unmerging, verifying
from ..api.given import AdapterLike
from ..errors import printable
from ..options import ConvertOptions, MatchOptions, RunOptions, SumOptions
from ..text import Summary, Table, fact_line
from .flags import Chosen, in_flags


def merge(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    report = merging.merge(base, adapters, out, progress=True, command=_command(), **options)
    if as_json:
        show_json(report.to_json())
    else:
        show(report.summary())


def merge_each(base: Path, adapters: Sequence[AdapterLike], out: Path, chosen: Chosen, *, as_json: bool) -> None:
    """Merge each alone, and print what came of it."""
    options = chosen.of(SumOptions, MatchOptions, RunOptions)
    reports = merging.merge_each(base, adapters, out, progress=True, command=_command(), **options)
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


def verify(out: Path, base: Path | None, adapters: Sequence[AdapterLike], *, original: Path | None, as_json: bool) -> None:
    """Prove, and print what was found."""
    if (base is None) != (not adapters):
        option = "--base" if base is None else "--adapter"
        raise typer.BadParameter(f"Missing option {option}: the proof needs both; without either, hashes are compared")
    proof = verifying.verify(out, base, adapters, requantise_from=original, progress=True)
    if as_json:
        show_json(proof.to_json())
        if proof.failures:
            raise typer.Exit(3)
        return
    proof.raise_for_failures()
    show(proof.summary())


def unmerge(out: Path, restored: Path, *, base: Path | None, undo: Path | None, overwrite: bool, as_json: bool) -> None:
    """Restore, and say what was."""
    report = unmerging.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, progress=True)
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


def show(summary: Summary) -> None:
    """Print what `str` of `summary` says, its table as wide as the terminal is."""
    _line(summary.title, "bold")
    for fact in summary.facts:
        _line(fact_line(fact))
    if summary.table is not None:
        _console().print(_table(summary.table))
    for fact in summary.after:
        _line(fact_line(fact))
    for warning in summary.warnings:
        _line(f"warning: {warning}", "yellow")


def show_json(value: Any) -> None:
    """Print one JSON value: an object or a list of them."""
    print(json.dumps([_in_flags(each) for each in value] if isinstance(value, list) else _in_flags(value), indent=2))


def _in_flags(value: Any) -> Any:
    """A JSON object whose warnings are in the words of the command line."""
    return {**value, "warnings": [in_flags(warning) for warning in value["warnings"]]} if "warnings" in value else value


def _line(text: str, style: str | None = None) -> None:
    _console().print(printable(in_flags(text)), markup=False, style=style)


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _UNLIMITED  # a table in a pipe is for grep: no name is cut in two
    return console


_UNLIMITED = 10_000


def _table(table: Table) -> Any:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for i, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if i in table.right else "left", header_style="dim", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    return drawn

"""What a command prints: a summary on standard output, readable without colour, at any width, in a pipe; or JSON."""

from __future__ import annotations

import json
from typing import Any

from ..errors import printable
from ..text import Summary, Table, fact_line
from .hints import in_flags


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

"""What people read: numbers as words, and a value as a short text, the same in a terminal, in `str` and in a notebook.

What belongs here: how such a text is laid out. What does not: what it says, which the value itself knows.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .errors import printable


@dataclass(frozen=True)
class Table:
    """Rows of cells below the names of their columns; the numbers of the columns in `right` are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[int] = ()


@dataclass(frozen=True)
class Summary:
    """A value as people read it: a title, facts as (name, text), at most one table, more facts, and warnings.

    Names from files may stand in any of it: they are escaped where it is shown.

    >>> print(Summary("base + adapter", [("kept", "99.9%")], warnings=["mind the gap"]))
    base + adapter
      kept      99.9%
    warning: mind the gap
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    table: Table | None = None
    after: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [self.title, *map(fact_line, self.facts), *_rows(self.table), *map(fact_line, self.after)]
        return "\n".join(printable(line).rstrip() for line in (*lines, *(f"warning: {each}" for each in self.warnings)))

    def to_html(self) -> str:
        """The same as HTML, for a notebook."""
        parts = [f"<div><p><strong>{_escaped(self.title)}</strong></p>", _facts_html(self.facts)]
        if self.table is not None:
            sides = ["right" if i in self.table.right else "left" for i in range(len(self.table.columns))]
            head = "".join(f'<th style="text-align:{s}">{_escaped(c)}</th>' for c, s in zip(self.table.columns, sides, strict=True))
            rows = (
                "".join(f'<td style="text-align:{s}">{_escaped(c)}</td>' for c, s in zip(row, sides, strict=True))
                for row in self.table.rows
            )
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        parts.append(_facts_html(self.after))
        parts += [f"<p><strong>warning:</strong> {_escaped(each)}</p>" for each in self.warnings]
        return "".join((*parts, "</div>"))


class Readable:
    """What has a `summary()`, and is shown by it: as text by `str`, as a table in a notebook."""

    def summary(self) -> Summary:
        """What people read of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary().to_html()


def fact_line(fact: tuple[str, str]) -> str:
    """A fact as a line; one without a name begins where names do.

    >>> fact_line(("kept", "99.9%")), fact_line(("", "4 tensors"))
    ('  kept      99.9%', '  4 tensors')
    """
    name, text = fact
    return f"  {name:<9} {text}" if name else f"  {text}"


def _rows(table: Table | None) -> Iterator[str]:
    if table is None:
        return
    cells = [[printable(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if i in table.right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )


def _facts_html(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    rows = (
        f'<tr><th style="text-align:left">{_escaped(name)}</th><td style="text-align:left">{_escaped(text)}</td></tr>'
        for name, text in facts
    )
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def size(nbytes: float) -> str:
    """Bytes with three digits and a decimal unit.

    >>> size(0), size(999), size(2_204_000_000)
    ('0 B', '999 B', '2.20 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    if unit == "B" or nbytes >= 100:
        return f"{nbytes:.0f} {unit}"
    return f"{nbytes:.3g} {unit}" if nbytes >= 10 else f"{nbytes:.2f} {unit}"


def per_second(nbytes: float, seconds: float) -> str:
    """A rate.

    >>> per_second(3_000_000, 2)
    '1.50 MB/s'
    """
    return f"{size(nbytes / max(seconds, 1e-9))}/s"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "file"), plural(2, "file")
    ('1 file', '2 files')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

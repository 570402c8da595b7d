"""Every row of the matrix of faults has a test with its number, or a reason why it has none."""

from __future__ import annotations

import re
from pathlib import Path

ROWS = range(1, 65)

NOT_HERE = {
    60: "worker processes and remote nodes: a merge is one process",
    61: "uploads to object stores: the output is a folder",
}


def test_all_rows() -> None:
    names = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {int(number) for number in re.findall(r"def test_row_(\d+)_", names)}
    assert tested & NOT_HERE.keys() == set()
    assert sorted(tested | NOT_HERE.keys()) == list(ROWS)

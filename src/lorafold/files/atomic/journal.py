"""The journal of a merge, in its hidden folder: what is being made, and which files of it are finished.

One JSON object a line: first the fields that say what is being made, then a line for each file that is on disk whole. A line
that was cut short by a crash ends the journal; what stands before it holds. What the fields mean is for others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import InputError
from .. import strictjson
from ..regular import read_regular
from .checks import output_fault
from .durable import sync_folder

JOURNAL_NAME = ".lorafold-journal.jsonl"
_LARGEST = 1 << 28


@dataclass(frozen=True)
class Finished:
    """A file that is on disk whole.

    - `name`: in the folder; `digest`: the hash of all its bytes, empty where they were not read back
    - `state`: of the file when it was finished, see `state_of`
    - `proven`: whether it was read back and proven
    - `kept`: the numbers of `Kept`, by merged tensor
    """

    name: str
    digest: str
    proven: bool
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    state: Sequence[int] = ()


@dataclass(frozen=True)
class Journal:
    """What a journal says: `fields` of what is being made, and the finished files by name."""

    fields: Mapping[str, Any]
    finished: Mapping[str, Finished]


def read_journal(folder: Path) -> Journal | None:
    """The journal in `folder`; None where there is none, or nothing of it can be read."""
    try:
        lines = read_regular(folder / JOURNAL_NAME, _LARGEST).split(b"\n")
        fields = strictjson.parse(lines[0], JOURNAL_NAME)
    except InputError:
        return None
    if not isinstance(fields, dict):
        return None
    finished: dict[str, Finished] = {}
    for line in lines[1:-1]:  # after the last newline there is nothing, or a line that was cut short
        try:
            entry = Finished(**strictjson.parse(line, JOURNAL_NAME))
        except (InputError, TypeError):
            break
        if not _fits(entry):
            break
        finished[entry.name] = entry
    return Journal(fields, finished)


def finished_names(folder: Path) -> Collection[str]:
    """What the journal in `folder` says is finished there, by name; nothing where there is none."""
    journal = read_journal(folder)
    return () if journal is None else journal.finished.keys()


def begin_journal(folder: Path, fields: Mapping[str, Any], finished: Collection[Finished] = ()) -> None:
    """Write a new journal in `folder`, in place of one that may be there, on disk when this returns.

    Raises `OutputError` where it cannot be written.
    """
    lines = [dict(fields), *(asdict(entry) for entry in finished)]
    path, aside = folder / JOURNAL_NAME, folder / f"{JOURNAL_NAME}.new"
    _write(aside, "".join(map(_line, lines)), "wb")
    try:
        os.replace(aside, path)
    except OSError as cause:
        raise output_fault(cause, path) from cause
    sync_folder(folder)


def journal_finished(folder: Path, entry: Finished) -> None:
    """Add `entry` to the journal in `folder`, on disk when this returns.

    Raises `OutputError` where it cannot be written.
    """
    _write(folder / JOURNAL_NAME, _line(asdict(entry)), "ab")


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True) + "\n"


def _write(path: Path, text: str, mode: Literal["wb", "ab"]) -> None:
    try:
        with open(path, mode) as file:
            file.write(text.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise output_fault(cause, path, len(text)) from cause


def _fits(entry: Finished) -> bool:
    texts = isinstance(entry.name, str) and isinstance(entry.digest, str) and "/" not in entry.name
    texts = texts and isinstance(entry.state, list | tuple) and all(type(number) is int for number in entry.state)
    return texts and isinstance(entry.proven, bool) and isinstance(entry.kept, dict) and all(map(_is_pair, entry.kept.values()))


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) in (2, 3) and all(type(number) in (int, float) for number in value)

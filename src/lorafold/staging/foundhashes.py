"""Hashes of the files that a stopped run left, begun while there is something else to wait for.

A second run reads all that it found, to know that it still holds. The command line has a second's worth of imports to do before it
can begin, on one processor; the others may as well read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError
from ..regularfile import sha256_of, state_of
from .journal import read_journal
from .stagedfolder import left_folders

_AT_ONCE = 1 << 24
"""Bytes read and hashed at a time: the more, the less often this waits for whoever has the interpreter."""

_State = Sequence[int]
_begun: dict[Path, tuple[_State, Future[str]]] = {}
"""What was begun in this process, with the file's state before."""


def begin_to_hash(out: Path) -> None:
    """Begin to hash the finished files that stopped runs left for `out`, in the background; what cannot be read is passed over."""
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "found")
    try:
        found = [
            folder / entry.name
            for folder in left_folders(Path(os.path.realpath(out)))
            if (journal := read_journal(folder)) is not None
            for entry in journal.finished.values()
            if entry.sha256  # without, they are known by their state
        ]
        for path in found:
            _begun[path] = (_state(path), pool.submit(sha256_of, path, at_once=_AT_ONCE))
    except (OSError, ValueError, InputError):
        pass  # the run itself says what is wrong
    pool.shutdown(wait=False)


def sha256_found(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal: as it was begun before, where the file has not changed since, or else read now.

    Raises `InputError` where it cannot be opened or read.
    """
    state, begun = _begun.pop(path, ((), None))
    if begun is not None and begun.exception() is None and _state(path) == state:
        return begun.result()
    return sha256_of(path)


def _state(path: Path) -> _State:
    return (*state_of(path), os.stat(path).st_ctime_ns)

"""Hashes of the files that a stopped run left, begun while there is something else to wait for.

A second run reads all that it found, to know that it still holds. The command line has a second's worth of imports to do before it
can begin, on one processor; another may as well read. It does so in a process of its own: a thread would wait for the interpreter
after each piece that it has read, for as long as an import likes to keep it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from ...errors import InputError
from ..digests import algorithm_of
from ..regular import sha256_of, state_of
from .folder import left_folders
from .journal import read_journal

_PROGRAM = str(Path(__file__).with_name("prehash_worker.py"))
_State = Sequence[int]
_begun: dict[Path, tuple[_State, Future[str]]] = {}
"""What was begun, in the order that it is done in, with the file's state before."""

_lock = threading.Lock()


def begin_to_hash(out: Path) -> None:
    """Begin to hash the finished files that stopped runs left for `out`, in the background; what cannot be read is passed over."""
    try:
        found = [
            folder / entry.name
            for folder in left_folders(Path(os.path.realpath(out)))
            if (journal := read_journal(folder)) is not None
            for entry in journal.finished.values()
            if entry.digest and algorithm_of(entry.digest) == "sha256"  # without, they are known by their state
        ]
        begun = {path: (_state(path), Future[str]()) for path in found}
        if begun:
            program = [sys.executable, "-I", "-S", _PROGRAM]
            process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            _begun.update(begun)
            threading.Thread(target=_follow, args=(process, begun), name="found", daemon=True).start()
    except (OSError, ValueError, InputError):
        pass  # the run itself says what is wrong


def _follow(process: subprocess.Popen[bytes], begun: dict[Path, tuple[_State, Future[str]]]) -> None:
    """Take what the program says, until nobody wants more."""
    try:
        with process:
            if process.stdin is not None and process.stdout is not None:
                process.stdin.write(b"".join(os.fsencode(path) + b"\0" for path in begun))
                process.stdin.close()
                for (path, (_, future)), line in zip(begun.items(), process.stdout, strict=False):
                    future.set_result(line.decode("ascii").strip())
                    if not any(other in _begun for other in begun if other != path):
                        break
            process.kill()
    except OSError:
        pass  # it ended at once, and takes no names
    finally:
        for _, future in begun.values():
            if not future.done():
                future.set_result("")


def sha256_found(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal: as it was begun before, where the file has not changed since, or else read now.

    Raises `InputError` where it cannot be opened or read.
    """
    with _lock:
        next_ = next((other for other, (_, future) in _begun.items() if not future.done()), None)
        state, future = _begun.get(path, ((), None))
        if future is not None and not future.done() and path != next_:
            future = None  # what is far from its turn is sooner done here
    found = future.result() if future is not None else ""
    with _lock:
        _begun.pop(path, None)
    return found if found and _state(path) == state else sha256_of(path)


def _state(path: Path) -> _State:
    return (*state_of(path), os.stat(path).st_ctime_ns)

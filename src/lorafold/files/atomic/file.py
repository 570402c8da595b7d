"""One file that appears whole or not at all: written beside its place under a hidden name, put there by one rename.

It goes with a folder that appears after it, and is taken back where that does not. What is written into it is for others.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import OutputError, OutputExistsError, printable
from .checks import check_apart, check_parent, output_fault
from .durable import sync_folder
from .folder import exchange, hidden_prefix, one_at_a_time


class StagedFile:
    """The file that will be `out`; a context manager.

    - `path`: the hidden file, and `fd`, open for writing; `out`: where it will be, links followed
    - `replaces`: asked of a file that is at `out` already whether it may be replaced; it stays until `keep`

    Entering makes the hidden file, and removes those of runs that have died. `place` puts it at `out`; `keep` says that it stays
    there. Leaving without that takes it away again, and puts back what was there before.

    Raises `OutputExistsError` where something is at `out`, `OutputError` where it is or lies in one of `inputs`, cannot be written,
    or another process is writing to it.
    """

    def __init__(self, out: Path | str, *, inputs: Sequence[Path] = (), replaces: Callable[[Path], bool] | None = None) -> None:
        self.out = Path(os.path.realpath(out))
        self.inputs = tuple(inputs)
        self.replaces = replaces
        self.path = self.out.parent / f"{hidden_prefix(self.out)}{os.getpid()}-{secrets.token_hex(4)}"
        self.fd, self._placed = -1, False
        self._old: Path | None = None

    def __enter__(self) -> Self:
        check_parent(self.out)
        check_apart(self.out, self.inputs)
        self._check_absent()
        try:
            with one_at_a_time(self.out.parent):
                _clear_leftovers(self.out)
                self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                with contextlib.suppress(OSError):  # no locks on this file system
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            self._discard()
            raise output_fault(cause, self.out) from cause
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._discard()

    def place(self) -> None:
        """Put the file, which is on the disk, in its place, for good once `keep` is called.

        Raises `OutputExistsError` where something has appeared there meanwhile, `OutputError` where the system refuses.
        """
        self._check_absent()
        try:
            if not os.path.lexists(self.out):
                os.rename(self.path, self.out)
            else:
                self._old = self.path
                if not exchange(self.path, self.out):
                    self._old = self.out.parent / f"{hidden_prefix(self.out)}{os.getpid()}-{secrets.token_hex(4)}"
                    os.link(self.out, self._old)
                    os.rename(self.path, self.out)
            self._placed = True
            sync_folder(self.out.parent)
        except OSError as cause:
            raise output_fault(cause, self.out) from cause

    def keep(self) -> None:
        """The file stays, and what was in its place before goes."""
        self._placed, self.path, self._old = False, self._old or self.path, None

    def _check_absent(self) -> None:
        if not os.path.lexists(self.out):
            return
        shown = printable(str(self.out))
        if not self.out.is_file():
            raise OutputExistsError(f"{shown} exists and is not a file", hint="choose another place")
        if self.replaces is None or not self.replaces(self.out):
            raise OutputExistsError(f"{shown} exists", hint="choose another place, or remove it")

    def _discard(self) -> None:
        """Remove the hidden file; take the placed one back."""
        with contextlib.suppress(OSError):
            if self._placed:
                os.unlink(self.out) if self._old is None else os.rename(self._old, self.out)
                sync_folder(self.out.parent)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
            self.fd = -1


def _clear_leftovers(out: Path) -> None:
    """Remove the hidden files that runs for `out` left behind when they died.

    Raises `OutputError` where such a run is alive.
    """
    ours = re.compile(re.escape(hidden_prefix(out)) + r"\d+-[0-9a-f]{8}")
    for name in sorted(os.listdir(out.parent)):
        path = out.parent / name
        if not ours.fullmatch(name) or path.is_symlink() or not path.is_file():
            continue
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            shown = printable(str(out))
            raise OutputError(f"another merge is writing to {shown}", hint="wait for it, or choose another place") from None
        except OSError:
            pass  # no locks on this file system: a run that lives holds its file open, and fails when it places it
        finally:
            os.close(fd)
        os.unlink(path)

"""A folder that appears whole or not at all: made beside its place under a hidden name, put there by one rename.

Killed at any instant, a run leaves at most the hidden folder, which the next run for the same output goes on with or removes.
What is written into the folder, and what of a left-over one is worth keeping, is for others.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import CheckpointError, OutputError, OutputExistsError, printable
from .checks import check_absent, check_apart, check_parent, output_fault
from .durable import keep_only, remove_tree, sync_folder, sync_tree
from .journal import JOURNAL_NAME, finished_names
from .owner import OWNER_NAME, living_owner, lock_folder, write_owner


class StagedFolder:
    """The folder that will be `out`; a context manager.

    - `path`: the hidden folder, to be filled
    - `out`: where it will be, links followed
    - `notes`: what was cleaned away or taken over at the start, in words
    - `linked`: what is at `out` may share files with `inputs`, as their second names
    - `worth_keeping`: asked of the hidden folder which of its entries the same run could use, when it is stopped

    Entering makes the hidden folder, or takes over that of a run that has died where `reuse` says so of it (it may also raise).
    `commit` puts it in its place; an existing empty folder is replaced, and with `overwrite` a checkpoint, which stays until the
    new one is in its place. Leaving without that, or by an error, removes it, unless something in it is worth keeping (by default
    what its journal says is finished) and the error does not lie in what was to be written (an interruption, a full disk).

    Raises `OutputExistsError` where something is at `out`, `OutputError` where it is, holds or lies in one of `inputs`, cannot
    be written, or another process is writing to it.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        overwrite: bool = False,
        inputs: Sequence[Path] = (),
        reuse: Callable[[Path], bool] | None = None,
        linked: bool = False,
        worth_keeping: Callable[[Path], Collection[str]] = finished_names,
    ) -> None:
        try:
            self.out = Path(os.path.realpath(out))
        except (OSError, ValueError) as cause:
            raise OutputError(f"{printable(str(out))} cannot be an output: {cause}") from cause
        self.overwrite = overwrite
        self.inputs = tuple(inputs)
        self.reuse = reuse
        self.linked = linked
        self.worth_keeping = worth_keeping
        self.notes: tuple[str, ...] = ()
        self.committed = False
        self._lock = -1
        self._path: Path | None = None

    @property
    def path(self) -> Path:
        """The hidden folder; after `commit`, the output."""
        if self._path is None:
            raise OutputError(f"{printable(str(self.out))} is not being written: the folder was not entered")
        return self._path

    def __enter__(self) -> Self:
        try:
            check_parent(self.out)
            check_apart(self.out, self.inputs, linked=self.linked)
            self.check_place()
            with one_at_a_time(self.out.parent):
                self.notes, reused = _clear_leftovers(self.out, self.reuse)
                self.check_place()  # again: a left-over may have been put back
                self._make(reused)
        except OSError as cause:
            self._discard()
            raise output_fault(cause, self.out) from cause
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self.committed:
            return
        kept = self.worth_keeping(self._path) if self._path is not None and isinstance(exc, _RESUMABLE) else ()
        if exc is not None and kept:
            self._leave_for_resuming(exc, kept)
        else:
            self._discard()

    def commit(self) -> None:
        """Bring everything to the disk and put the folder in its place, for good when this returns.

        Raises `OutputExistsError` where something has appeared there meanwhile, `OutputError` where the system refuses.
        """
        path = self.path
        try:
            sync_tree(path)
            self.check_place()
            for name in (JOURNAL_NAME, OWNER_NAME):  # last: until now they say what the folder is, and whose
                (path / name).unlink(missing_ok=True)
            sync_folder(path)
            replaced = self._replace(path)
        except OSError as cause:
            raise output_fault(cause, self.out) from cause
        self.committed = True
        self._path = self.out
        self._unlock()
        sync_folder(self.out.parent)
        if replaced is not None:
            remove_tree(replaced)  # the new one is in place: what is left of the old goes with the next run

    def check_place(self) -> None:
        """Raises `OutputExistsError` where something is at `out` that may not be replaced."""
        check_absent(self.out, self.overwrite)

    def _make(self, reused: Path | None) -> None:
        path = reused or self.out.parent / f"{hidden_prefix(self.out)}{os.getpid()}-{secrets.token_hex(4)}"
        if reused is None:
            path.mkdir()
            self._path = path
        self._lock = lock_folder(path)
        (path / OWNER_NAME).unlink(missing_ok=True)
        write_owner(path)
        self._path = path

    def _leave_for_resuming(self, error: BaseException, kept: Collection[str]) -> None:
        path = self.path
        fault = keep_only(path, {JOURNAL_NAME, *kept})
        where = printable(str(path))
        error.add_note(
            f"what was finished is kept in {where}; the same command goes on from there" + (f" ({fault})" if fault else "")
        )
        self._unlock()

    def _replace(self, path: Path) -> Path | None:
        """Rename; the folder that now holds what was there before."""
        try:
            os.rename(path, self.out)  # replaces an empty folder too
            return None
        except OSError:
            if not (self.overwrite and self.out.is_dir()):
                if os.path.lexists(self.out) and not self.overwrite:
                    raise OutputExistsError(f"{printable(str(self.out))} has appeared while it was being written") from None
                raise
        if exchange(path, self.out):
            return path
        aside = self.out.parent / f"{hidden_prefix(self.out)}{_OLD}{secrets.token_hex(4)}"
        os.rename(self.out, aside)
        try:
            os.rename(path, self.out)
        except BaseException:
            os.rename(aside, self.out)
            raise
        return aside

    def _discard(self) -> None:
        if self._path is not None:
            remove_tree(self._path)
            self._path = None
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_OLD = "old-"

_RESUMABLE = (KeyboardInterrupt, SystemExit, OutputError, CheckpointError, MemoryError)
"""What may be over when the same command is run again: numbers that are wrong are not."""


def hidden_prefix(out: Path) -> str:
    """How the hidden folders of `out` begin; a name near the system's limit is shortened."""
    name = os.fsencode(out.name)
    if len(name) <= 180:
        return f".{out.name}.lorafold-"
    short = name[:80].decode("utf-8", errors="ignore")
    return f".{short}.{hashlib.sha256(name).hexdigest()[:16]}.lorafold-"


def left_folders(out: Path) -> list[Path]:
    """The hidden folders of runs for `out`, dead or alive.

    Raises `OSError` where the folder that holds `out` cannot be read.
    """
    ours = re.compile(re.escape(hidden_prefix(out)) + rf"(\d+-|{_OLD})[0-9a-f]{{8}}")  # not of an output whose name begins alike
    folders = (out.parent / name for name in sorted(os.listdir(out.parent)) if ours.fullmatch(name))
    return [folder for folder in folders if not folder.is_symlink() and folder.is_dir()]


@contextlib.contextmanager
def one_at_a_time(parent: Path) -> Iterator[None]:
    """Of several processes that start to write in `parent`, one after the other looks for the others and makes its folder."""
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(100):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break  # no locks on this file system
        yield
    finally:
        os.close(fd)


def _clear_leftovers(out: Path, reuse: Callable[[Path], bool] | None) -> tuple[tuple[str, ...], Path | None]:
    """Remove what runs for `out` that have died left behind, but for one folder that `reuse` wants; what was done, in words.

    Raises `OutputError` where such a run is alive.
    """
    prefix = hidden_prefix(out)
    notes = []
    reused: Path | None = None
    for folder in left_folders(out):
        name = folder.name
        owner = living_owner(folder)
        if owner is not None:
            raise OutputError(
                f"another merge is writing to {printable(str(out))}: {owner}",
                hint=f"wait for it; if it is no longer running, remove {printable(str(folder))}",
            )
        if name.startswith(prefix + _OLD) and not os.path.lexists(out):
            os.rename(folder, out)  # a run died between moving the old output aside and putting the new one there
            notes.append(f"put back {printable(out.name)}, which a run that was killed had moved to {printable(name)}")
            continue
        if reused is None and reuse is not None and reuse(folder):
            reused = folder
            continue
        fault = remove_tree(folder)
        notes.append(f"removed {printable(name)}, left by a run that was killed" if fault is None else str(fault))
    return tuple(notes), reused


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system swap what they name, atomically; False, and nothing done, where the system cannot.

    Raises `OSError` where it can and refuses. renameat2(2), RENAME_EXCHANGE: Linux 3.15.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))

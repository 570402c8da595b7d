"""Files that are on disk when the call returns: written whole, copied, and the folders that hold them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import CheckpointError, OutputError, VerificationError, printable
from ..regular import open_regular, sha256_of
from .checks import output_fault

_AT_ONCE = 1 << 26
"""Bytes that the system is asked to move at once."""


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to the new file at `path`, with the mode that the umask leaves.

    Raises `OutputError` where the file exists or cannot be written.
    """
    data = text.encode("utf-8", "replace")  # a name of bytes that are no text holds half characters
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise output_fault(cause, path, len(data)) from cause


def write_json(path: Path, value: Any) -> None:
    """Write `value` to the new file at `path` as JSON, indented by two spaces, with a final newline, the order of keys kept.

    Raises `OutputError` where the file exists or cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the regular file `source` to the new file `target`, making its folder where needed; the mode follows the umask.

    Raises `CheckpointError` where the source cannot be read, `OutputError` where the target exists or cannot be written.
    """
    fd, status = open_regular(source, error=CheckpointError)
    with open(fd, "rb") as reading:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as writing:
                done = 0
                while count := kernel_copy(reading.fileno(), writing.fileno(), _AT_ONCE, done, done):
                    done += count
                writing.seek(done)
                for data in _rest(reading, done, source):  # what the system did not move; mostly nothing
                    writing.write(data)
                writing.flush()
                os.fsync(writing.fileno())
        except OSError as cause:
            raise output_fault(cause, target, status.st_size) from cause


def _rest(reading: BinaryIO, start: int, source: Path) -> Iterator[bytes]:
    """The bytes of `reading` from `start` on, some at a time."""
    try:
        reading.seek(start)
        while data := reading.read(1 << 20):
            yield data
    except OSError as cause:
        raise CheckpointError(f"{printable(str(source))} cannot be read: {cause.strerror}") from cause


def copy_proven(source: Path, target: Path) -> str:
    """As `copy_file`; then both are read, at the same time, and the sha256 that they have is returned.

    Raises `VerificationError` where it is not the same.
    """
    copy_file(source, target)
    with ThreadPoolExecutor(2, "hash") as pool:
        found, wanted = pool.map(partial(sha256_of, error=CheckpointError), (target, source))
    if found != wanted:
        raise VerificationError(f"{printable(str(target))} is not what {printable(str(source))} is", hint="run it again")
    return found


def sync_folder(folder: Path) -> None:
    """Bring the entries of `folder` to the disk.

    Raises `OutputError` where the disk refuses.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as cause:
        raise output_fault(cause, folder) from cause


def sync_tree(folder: Path) -> None:
    """Bring every file and folder below `folder`, and itself, to the disk.

    Raises `OutputError` where the disk refuses.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(place, name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as cause:
                raise output_fault(cause, path) from cause
        sync_folder(Path(place))


def keep_only(folder: Path, names: Collection[str]) -> OutputError | None:
    """Remove everything in `folder` but the files `names`; what stood in the way, where something could not be removed."""
    try:
        for entry in list(os.scandir(folder)):
            if entry.name in names:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
    except OSError as cause:
        return output_fault(cause, folder)
    return None


def remove_tree(folder: Path) -> OutputError | None:
    """Remove `folder` and all below; what stood in the way, where it could not be removed whole."""
    with contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            raise
        except OSError as cause:
            return output_fault(cause, folder)
    return None


_START = 2  # SYNC_FILE_RANGE_WRITE


def start_writeback(fd: int) -> None:
    """Let the system begin to write what the file `fd` has in memory alone; waits for a place in the disk's queue at most.

    It promises nothing, and an error is left for fsync to tell. Where the system has no such call, nothing happens.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, ctypes.c_int64(0), ctypes.c_int64(0), _START)  # 0 bytes from 0 on: all


@cache
def _sync_file_range() -> Any:
    """Linux's, or None."""
    try:
        return ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):  # Windows has no library of that name
        return None


_NO_KERNEL_COPY = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM, errno.ETXTBSY, errno.EISDIR}
)
_FICLONE = 0x40049409  # of linux/fs.h
_NO_CLONE = _NO_KERNEL_COPY | {errno.ENOTTY, errno.EACCES, errno.EROFS}
_NO_LINK = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOENT, errno.ESTALE}
)


def kernel_copy(source: int, target: int, nbytes: int, source_start: int, start: int) -> int:
    """How many bytes the system moved from the descriptor `source` to `target`, sharing their place on the disk where it can.

    At most `nbytes`, from offset `source_start` to offset `start`. 0 where it cannot, where the source has ended, or where one of
    the two files could not be read or written: to move them by hand tells which.

    Raises `OSError` where there is no room.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, nbytes, source_start, start)
    except OSError as cause:
        if cause.errno in _NO_KERNEL_COPY or cause.errno == errno.EIO:
            return 0
        raise


def clone_file(source: Path, target: Path) -> OSError | None:
    """Make the new file `target` a copy of `source` that shares its place on the disk until one of them is written to, as XFS and
    Btrfs can (reflink); what stood in the way, where the file system cannot, or they are on two. Nothing is at `target` then.

    Raises `CheckpointError` where `source` is no file that can be read, `OutputError` where there is something at `target`, or no
    room.
    """

    def clone(fd: int) -> None:
        with open(target, "xb") as file:
            try:
                fcntl.ioctl(file.fileno(), _FICLONE, fd)
                os.fsync(file.fileno())
            except OSError:
                os.unlink(target)
                raise

    return _uncopied(source, target, clone, _NO_CLONE)


def link_file(source: Path, target: Path) -> OSError | None:
    """Make `target` another name of the file that `source` is, links followed; what stood in the way, where that cannot be.

    It cannot where they are on different file systems, where the file system has no hard links, or where the user may not. Nothing
    is at `target` then.

    Raises as `clone_file` does.
    """

    def link(fd: int) -> None:
        os.link(os.path.realpath(source), target)
        if not os.path.samestat(os.stat(target), os.fstat(fd)):
            os.unlink(target)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # the source was replaced meanwhile

    return _uncopied(source, target, link, _NO_LINK)


def _uncopied(source: Path, target: Path, make: Callable[[int], None], refusals: Collection[int]) -> OSError | None:
    """Call `make` with a descriptor of `source`; the error where it is one of `refusals`, and `target` has to be a copy."""
    fd, _ = open_regular(source, error=CheckpointError)
    try:
        make(fd)
    except OSError as cause:
        if cause.errno in refusals:
            return cause
        raise output_fault(cause, target) from cause
    finally:
        os.close(fd)
    return None

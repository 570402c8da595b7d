"""Bytes that the system moves from file to file itself, or need not move: clones, and files that get a second name."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Collection
from pathlib import Path

from ...errors import CheckpointError
from ..regular import open_regular
from .checks import output_fault

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

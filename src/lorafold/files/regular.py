"""Opening a file that a stranger may have put there: regular files only, never waiting on a pipe, never a device.

What belongs here: from a path to an open descriptor or to a bounded number of bytes, with one typed error. What the bytes mean
is for others.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError, printable


def open_regular(path: Path, *, error: type[InputError] = InputError) -> tuple[int, os.stat_result]:
    """A read-only descriptor of the regular file at `path`, and its status; symbolic links are followed.

    Raises `error` where there is nothing, something else (folder, named pipe, device, socket), a loop of links, or no
    permission.
    """
    shown = printable(str(path))
    try:
        status = os.stat(path)  # before opening: to open a device can already do something
        _require_regular(status, shown, error)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        broken = " (a symbolic link to nothing)" if path.is_symlink() else ""
        raise error(f"{shown}: no such file{broken}") from None
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else str(cause)
        raise error(f"{shown} cannot be opened: {reason}") from cause
    try:
        status = os.fstat(fd)
        _require_regular(status, shown, error)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def read_regular(path: Path, limit: int, *, error: type[InputError] = InputError) -> bytes:
    """The bytes of the regular file at `path`, at most `limit` of them.

    Raises `error` where it cannot be opened or read, or is larger than `limit`.
    """
    fd, status = open_regular(path, error=error)
    with open(fd, "rb") as file:
        if status.st_size > limit:
            raise error(f"{printable(str(path))} has {status.st_size} bytes, more than the {limit} that are read of such a file")
        try:
            data = b"".join(_parts(file, limit + 1))
        except OSError as cause:
            raise error(f"{printable(str(path))} cannot be read: {cause.strerror}") from cause
    if len(data) > limit:
        raise error(f"{printable(str(path))} has more than the {limit} bytes that are read of such a file")
    return data


def _parts(file: BinaryIO, most: int) -> Iterator[bytes]:
    """At most `most` bytes of `file`; as much at a time as it has, since reading takes the memory that it was asked for."""
    while most and (part := file.read(min(most, 1 << 20))):
        yield part
        most -= len(part)


def sha256_of(path: Path, *, error: type[InputError] = InputError) -> str:
    """The SHA-256 of the regular file at `path`, hexadecimal.

    Raises `error` where it cannot be opened or read.
    """
    fd, _ = open_regular(path, error=error)
    with open(fd, "rb", buffering=0) as file:
        try:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
            return digest.hexdigest()
        except OSError as cause:
            raise error(f"{printable(str(path))} cannot be read: {cause.strerror}") from cause


def state_of(path: Path, *, error: type[InputError] = InputError) -> tuple[int, int, int]:
    """Size in bytes, time of change in nanoseconds and inode of the regular file at `path`: equal while nothing touches it.

    Raises `error` where it cannot be opened.
    """
    fd, status = open_regular(path, error=error)
    os.close(fd)
    return status.st_size, status.st_mtime_ns, status.st_ino


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _require_regular(status: os.stat_result, shown: str, error: type[InputError]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise error(f"{shown} is {kind}, not a regular file")

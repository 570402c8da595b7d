"""What the operating system says when writing fails, as an `OutputError` with the bytes needed and free."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ...errors import OutputError, printable


def free_bytes(path: Path) -> int | None:
    """Bytes free to this user on the file system of `path` or of its nearest folder that exists; None where it does not say."""
    for place in (path, *path.parents):
        try:
            status = os.statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        return status.f_bavail * status.f_frsize
    return None


def output_fault(cause: OSError, path: Path, needed: int | None = None) -> OutputError:
    """The error to raise where writing `path`, of `needed` bytes, failed with `cause`."""
    parts = [f"{printable(str(path))} cannot be written: {cause.strerror or cause}"]
    free = free_bytes(path)
    if needed is not None:
        parts.append(f"needed {needed} bytes" + ("" if free is None else f", free {free}"))
    return OutputError("; ".join(parts), hint=_HINTS.get(cause.errno or 0))


_HINTS = {
    errno.ENOSPC: "free some space, or write to another file system",
    errno.EDQUOT: "your quota on this file system is used up: free some of it, or write to another",
    errno.EFBIG: "the file is larger than this process or file system allows: see `ulimit -f`, or write smaller shards",
    errno.EROFS: "the file system is read-only: write to another",
    errno.EACCES: "you may not write there: choose another place, or change its permissions",
    errno.EIO: "the disk reports a fault: look at the system's log",
}

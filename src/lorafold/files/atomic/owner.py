"""Whose a hidden folder is: a running process's, or one that has died, which may be cleaned away.

The folder is locked for as long as its process lives, and the system drops the lock when the process dies, however it dies.
Where the file system has no such locks, the process's number and start time in a small file decide. The processes of another
host cannot be seen: its folders count as alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from ...errors import InputError
from .. import strictjson
from .durable import write_text

OWNER_NAME = ".lorafold-owner.json"


def lock_folder(folder: Path) -> int:
    """A descriptor of `folder` that holds its lock until it is closed.

    Raises `BlockingIOError` where another process holds it. Where the file system has no locks, the descriptor alone.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError as cause:
        if cause.errno not in _NO_LOCKS:
            os.close(fd)
            raise
    return fd


def write_owner(folder: Path) -> None:
    """Write down in `folder` that this process owns it.

    Raises `OutputError` where it cannot be written.
    """
    pid = os.getpid()
    owner = {"host": socket.gethostname(), "pid": pid, "started": _start_time(pid)}
    write_text(folder / OWNER_NAME, json.dumps(owner) + "\n")


def living_owner(folder: Path) -> str | None:
    """Who is at work in `folder`, in words; None where nobody is any more."""
    owner = _read_owner(folder)
    words = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    if owner and owner["host"] != socket.gethostname():
        return words  # its processes cannot be seen from here
    try:
        os.close(lock_folder(folder))
    except BlockingIOError:
        return words
    except FileNotFoundError:
        return None
    except OSError:
        return words  # not this user's to judge
    # Not locked: dead, unless this file system has no locks.
    return words if owner and not _has_locks(folder) and _is_running(owner) else None


_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL})


def _has_locks(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as cause:
        return cause.errno not in _NO_LOCKS
    finally:
        os.close(fd)
    return True


def _read_owner(folder: Path) -> dict[str, Any] | None:
    try:
        owner = strictjson.load(folder / OWNER_NAME, limit=4096)
    except InputError:
        return None
    fits = isinstance(owner, dict) and isinstance(owner.get("host"), str) and type(owner.get("pid")) is int
    return owner if fits else None


def _is_running(owner: dict[str, Any]) -> bool:
    pid = owner["pid"]
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user
    started = _start_time(pid)
    return started is None or owner.get("started") is None or started == owner["started"]


def _start_time(pid: int) -> int | None:
    """When the process started, in the system's own units, so that a number given anew is not taken for the old one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None

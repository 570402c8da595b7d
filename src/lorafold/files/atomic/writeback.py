"""Bringing a file to the disk while it is still being written, so that little is left to wait for at its end."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

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

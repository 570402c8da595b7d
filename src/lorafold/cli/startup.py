"""What a command does before it computes: importing what takes long, and showing progress on a terminal (none in a pipe)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..files.progress import Progress, watched


@contextmanager
def loading() -> Iterator[None]:
    """Import within: nothing is collected, what is there at the end is never looked at again, and other threads get their turn.

    torch's modules are half a million objects and no garbage; to look for some takes a seventh of the time that they take. And
    a thread that reads meanwhile would otherwise wait 5 ms for the interpreter each time that it has read something.
    """
    collects, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(0.0002)
    try:
        yield
        gc.freeze()
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()


def progress() -> Progress:
    """A bar where standard error is a terminal."""
    return watched(True)

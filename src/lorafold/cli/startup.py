"""What a command does before it computes: importing what takes long, and showing progress on a terminal (none in a pipe)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..files.progress import Progress, Quiet


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


class Bar:
    """A bar on standard error for each phase, gone when the phase is over."""

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Show the phase `name` over `nbytes` bytes; over 0 bytes, that it goes on."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description:>7}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=nbytes or None)
            yield lambda done: bar.advance(task, done)


def progress() -> Progress:
    """A bar where standard error is a terminal."""
    return Bar() if sys.stderr.isatty() else Quiet()

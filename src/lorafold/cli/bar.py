"""Progress on a terminal: bytes, rate, time left. Silence in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..files.progress import Progress, Quiet


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

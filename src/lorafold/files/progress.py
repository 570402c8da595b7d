"""How long work tells how far it is, and who is told: a bar in a terminal or a notebook, a function of the caller's, or nobody.

Each phase is also logged, at the level DEBUG, by ``logging.getLogger("lorafold")``.
"""

from __future__ import annotations

import html
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any, Protocol

from ..errors import InputError

LOG = logging.getLogger("lorafold")


class Progress(Protocol):
    """What is told of progress."""

    def phase(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """A stretch of work over `nbytes` bytes; what it gives is called with each number of bytes done, from any thread."""
        ...


Watching = Progress | Callable[[str, int, int], object] | bool | None
"""What a caller gives as `progress`.

- ``True``: a bar on standard error where that is a terminal, one below the cell in a notebook, and nothing in a pipe
- a function: called as ``function(phase, done, total)`` with numbers of bytes, at the beginning of each phase and whenever some are
  done; from threads that work, but never twice at once. `total` is 0 where it is not known. What it raises ends the work
- a `Progress`: told of phases
- ``False`` or None: nobody is told
"""


def watched(progress: Watching) -> Progress:
    """Who is to be told of progress.

    Raises `InputError` for what can be told nothing.

    >>> with watched(lambda phase, done, total: print(phase, done, total)).phase("merge", 8) as advance:
    ...     advance(8)
    merge 0 8
    merge 8 8
    """
    if isinstance(progress, Logged):
        return progress
    if progress is None or progress is False:
        return Logged(Quiet())
    if progress is True:
        return Logged(_drawn())
    if hasattr(progress, "phase"):
        return Logged(progress)
    if callable(progress):
        return Logged(Told(progress))
    raise InputError(
        f"progress can be told nothing: it is of type {type(progress).__name__}",
        hint="give True, False, or a function of (phase, done, total)",
    )


class Quiet:
    """Shows nothing."""

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """A phase that nobody watches."""
        yield _ignore


class Logged:
    """Tells another, and the log."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """A phase of the other's, with a line at each end."""
        started = time.monotonic()
        LOG.debug("%s: begins, over %d bytes", name, nbytes)
        with self._progress.phase(name, nbytes) as advance:
            yield advance
        LOG.debug("%s: done after %.3f s", name, time.monotonic() - started)


class Told:
    """Calls a function with the phase, the bytes done and all of them."""

    def __init__(self, function: Callable[[str, int, int], object]) -> None:
        self._function = function

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """A phase whose bytes are counted."""
        lock, done = threading.Lock(), 0

        def advance(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                self._function(name, done, nbytes)

        self._function(name, 0, nbytes)
        yield advance


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


class NotebookBar:
    """A bar below a notebook's cell for each phase, by what IPython itself has; the cell is empty again when the phase is over."""

    every = 0.1  # seconds between two pictures

    def __init__(self, display: Callable[..., Any], picture: Callable[[str], Any]) -> None:
        self._display, self._picture = display, picture

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """Show the phase `name` over `nbytes` bytes."""
        handle = self._display(self._picture(_bar_html(name, 0, nbytes)), display_id=True)
        shown = time.monotonic()

        def show(phase: str, done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= self.every:
                shown = time.monotonic()
                handle.update(self._picture(_bar_html(phase, done, total)))

        try:
            with Told(show).phase(name, nbytes) as advance:
                yield advance
        finally:
            handle.update(self._picture(""))


def _bar_html(name: str, done: int, total: int) -> str:
    """An element that browsers draw themselves; without a value it says that something goes on.

    >>> _bar_html("merge", 1, 4)
    '<label>merge <progress max="4" value="1"></progress> 25%</label>'
    """
    value, share = (f' max="{total}" value="{done}"', f" {min(1.0, done / total):.0%}") if total else ("", "")
    return f"<label>{html.escape(name)} <progress{value}></progress>{share}</label>"


def _drawn() -> Progress:
    """A bar where there is someone to see it."""
    ipython = sys.modules.get("IPython")  # who runs in a notebook has it
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is not None:
        shows = import_module("IPython.display")
        return NotebookBar(shows.display, shows.HTML)
    return Bar() if sys.stderr is not None and sys.stderr.isatty() else Quiet()


def _ignore(nbytes: int) -> None:
    pass

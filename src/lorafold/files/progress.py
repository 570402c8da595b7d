"""How long work tells how far it is. Who shows it, and whether anyone does, is decided above."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """What is told of progress."""

    def phase(self, name: str, nbytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """A stretch of work over `nbytes` bytes; what it gives is called with each number of bytes done, from any thread."""
        ...


class Quiet:
    """Shows nothing."""

    @contextmanager
    def phase(self, name: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        """A phase that nobody watches."""
        yield _ignore


def _ignore(nbytes: int) -> None:
    pass

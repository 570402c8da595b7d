"""A value that several threads need and one of them makes, when it is first asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Once(Generic[Made]):
    """What `make` makes, the first time it is asked for; a thread that asks meanwhile waits.

    >>> value = Once(lambda: print("made") or 1)
    >>> value(), value()
    made
    (1, 1)
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make: Callable[[], Made] | None = make
        self._lock = threading.Lock()

    def __call__(self) -> Made:
        if self._make is not None:
            with self._lock:
                if self._make is not None:
                    self._made = self._make()
                    self._make = None
        return self._made

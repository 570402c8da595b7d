"""How far a file is written, for whoever reads it while it grows."""

from __future__ import annotations

import threading

from .tensorfile_coverage import Coverage


class Written:
    """The bytes of a file that are written, told by who writes them; those below `mark` are read by others already.

    >>> written = Written()
    >>> written.add(4, 8), written.mark, written.add(0, 4), written.mark
    (None, 0, None, 8)
    >>> written.wait(8)
    True
    """

    def __init__(self) -> None:
        self._coverage = Coverage()
        self._lock = threading.Lock()  # taken by itself: a signal that comes while a Condition is entered can leave it locked
        self._changed = threading.Condition(self._lock)
        self._mark = 0
        self._ended = False

    @property
    def mark(self) -> int:
        """The first offset that is not written. It only rises."""
        return self._mark

    def add(self, start: int, stop: int) -> None:
        """The offsets `start` to `stop` are written now."""
        with self._lock:
            self._coverage.add(start, stop)
            first = next(iter(self._coverage.intervals), (0, 0))
            if first[0] == 0 and first[1] > self._mark:
                self._mark = first[1]
                self._changed.notify_all()

    def wait(self, offset: int) -> bool:
        """Wait until all before `offset` is written; False where that never comes."""
        with self._lock:
            self._changed.wait_for(lambda: self._mark >= offset or self._ended)
            return self._mark >= offset

    def end(self) -> None:
        """Nothing more is written: nobody need wait."""
        with self._lock:
            self._ended = True
            self._changed.notify_all()

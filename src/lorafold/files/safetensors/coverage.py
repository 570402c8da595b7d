"""Which bytes of a file have been written, each once, and how far it is written for whoever reads it while it grows."""

from __future__ import annotations

import threading
from bisect import bisect_right


class WrittenBytes:
    """The bytes of a file that are written, told by who writes them; those below `mark` are read by others already.

    >>> written = WrittenBytes()
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


class Coverage:
    """Disjoint intervals of offsets, joined where they touch.

    >>> c = Coverage()
    >>> c.add(0, 4), c.add(8, 12), c.add(4, 8), c.intervals
    (True, True, True, [(0, 12)])
    >>> c.add(3, 5), c.first_gap(0, 20)
    (False, 12)
    """

    def __init__(self) -> None:
        self.intervals: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> bool:
        """Add the offsets `start` to `stop`; False, and nothing added, where some of them are in already."""
        if start >= stop:
            return True
        at = bisect_right(self.intervals, (start, start))
        before = self.intervals[at - 1] if at else None
        after = self.intervals[at] if at < len(self.intervals) else None
        if (before and before[1] > start) or (after and after[0] < stop):
            return False
        first, last = at, at
        if before and before[1] == start:
            start, first = before[0], at - 1
        if after and after[0] == stop:
            stop, last = after[1], at + 1
        self.intervals[first:last] = [(start, stop)]
        return True

    def first_gap(self, start: int, stop: int) -> int | None:
        """The first offset from `start` to `stop` that is not in; None where all are."""
        for low, high in self.intervals:
            if low <= start < high:
                start = high
        return start if start < stop else None

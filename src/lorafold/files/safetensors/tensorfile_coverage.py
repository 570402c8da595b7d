"""Which bytes of a file have been written: each must be, and none twice."""

from __future__ import annotations

from bisect import bisect_right


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

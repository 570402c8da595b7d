"""Blocks done by several threads, their results in order, and what threads share: buffers used again, values made once.

torch's own threads meet after every operation, and wait there for whichever of them the system has not run; a block in each of
our threads meets nobody. So torch is told to use one thread in each while they work.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


AHEAD = 2
"""Tasks begun for each thread: one that it does, and one that is done or waits, while the results before it are dealt with."""


class Workers:
    """Threads that work through tasks; made by `workers`."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool = pool
        self._count = count

    def results(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``work(task)`` for each task, in order. At most twice as many as there are threads are begun before their turn."""
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(work, task))
                if len(waiting) >= AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def workers(count: int | None = None) -> Iterator[Workers]:
    """`count` threads, by default one per CPU that this process may use."""
    count = count or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, "lorafold") as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(threads)


class Buffers:
    """Byte buffers for several threads; it holds as many as were ever in use at once."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bytearray:
        """A buffer of at least `nbytes` bytes, with anything in it."""
        with self._lock:
            for i, buffer in enumerate(self._free):
                if len(buffer) >= nbytes:
                    return self._free.pop(i)
            if self._free:
                self._free.pop()  # too small: a larger one takes its place
        return bytearray(nbytes)

    def give(self, *buffers: bytearray) -> None:
        """Give buffers back; nothing may use them any more."""
        with self._lock:
            self._free += buffers


class Room:
    """Room for `nbytes` bytes that several threads share; what needs more than that has it alone.

    >>> room = Room(10)
    >>> with room.taking(6), room.taking(4):
    ...     pass
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        """Wait until there are `nbytes`, and hold them meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._nbytes)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


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

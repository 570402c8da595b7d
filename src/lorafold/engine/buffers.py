"""Buffers that go round: a block's memory is taken, filled, used and given back, so that no block pays for fresh pages."""

from __future__ import annotations

import threading


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

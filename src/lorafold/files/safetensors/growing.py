"""A safetensors file of which the length of some tensors shows only while they are written: its header is written last.

The format puts the header first, and says nothing about white space after it: so room is kept for the longest header there can be,
and what is left of it is filled with spaces. Until then the file is none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import OutputError, printable
from ..atomic.checks import output_fault
from .coverage import Coverage
from .header import encode_header
from .info import TensorInfo, TensorSpec


class GrowingWriter:
    """Writes into the open, empty file `fd` at `path`.

    - `fixed`: tensors whose size is known, wider elements first; they may be written in any order
    - `growing`: names of tensors of bytes (U8) that follow, each with the most bytes that it may have; written in this order
    - `metadata`: the file's metadata, of the length that those given to `finish` will have, or longer

    Raises `OutputError` where the system refuses to write.
    """

    def __init__(
        self,
        fd: int,
        path: Path,
        fixed: Sequence[TensorSpec],
        growing: Sequence[tuple[str, int]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self._fd = fd
        self._fixed = tuple(fixed)
        self._sizes = dict.fromkeys((name for name, _ in growing), 0)
        longest = [*self._fixed, *(TensorSpec(name, "U8", (most,), most) for name, most in growing)]
        head, infos = encode_header(longest, metadata, path)
        self._room = len(head)
        self._tensors: Mapping[str, TensorInfo] = {info.name: info for info in infos[: len(self._fixed)]}
        self._end = max([self._room, *(info.stop for info in self._tensors.values())])
        self._coverage = Coverage()
        self._last: str | None = None

    def write(self, name: str, offset: int, view: memoryview) -> None:
        """Write `view` at byte `offset` of the tensor `name`, whose size is known."""
        info = self._tensors[name]
        if offset + len(view) > info.nbytes or not self._coverage.add(info.start + offset, info.start + offset + len(view)):
            raise OutputError(f"{printable(str(self.path))}: '{printable(name)}' has no room for bytes {offset} and after")
        self._pwrite(view, info.start + offset)

    def append(self, name: str, view: memoryview) -> None:
        """Write `view` behind what the growing tensor `name` has already; those before it in the list are finished by that."""
        names = list(self._sizes) if self._last != name else [name]
        if self._last is not None and self._last != name and names.index(name) < names.index(self._last):
            raise OutputError(f"{printable(str(self.path))}: '{printable(name)}' was finished before")
        self._pwrite(view, self._end)
        self._end += len(view)
        self._sizes[name] += len(view)
        self._last = name

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Write the header and bring the file to the disk; its bytes.

        Raises `OutputError` where a tensor is not complete or the header is longer than its room.
        """
        for info in self._tensors.values():
            if self._coverage.first_gap(info.start, info.stop) is not None:
                raise OutputError(f"{printable(str(self.path))}: '{printable(info.name)}' is not complete")
        grown = [TensorSpec(name, "U8", (size,), size) for name, size in self._sizes.items()]
        head, _ = encode_header([*self._fixed, *grown], metadata, self.path)
        if len(head) > self._room:
            raise OutputError(f"{printable(str(self.path))}: its header has {len(head)} bytes, room was kept for {self._room}")
        text = head[8:] + b" " * (self._room - len(head))
        self._pwrite(memoryview(len(text).to_bytes(8, "little") + text), 0)
        try:
            os.fsync(self._fd)
        except OSError as cause:
            raise output_fault(cause, self.path, self._end) from cause
        return self._end

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done:], offset + done)
            except OSError as cause:
                raise output_fault(cause, self.path, self._end) from cause

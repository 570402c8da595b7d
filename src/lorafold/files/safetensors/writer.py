"""Writing one safetensors file: laid out beforehand, filled in any order, done only when every byte has been written once.

Where the file stands and when it becomes visible is the folder's affair (`lorafold.files.atomic`); so is its removal
after an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ...errors import OutputError, printable
from ..atomic.checks import output_fault
from ..atomic.durable import kernel_copy, start_writeback
from .coverage import Coverage, WrittenBytes
from .header import PT_METADATA, encode_header
from .info import TensorInfo, TensorSpec
from .reader import TensorFile

_CHUNK = 8 * 1024 * 1024
"""Bytes moved between files at once."""

_AT_ONCE = 1024 * 1024
"""Bytes of one write. For a larger one Linux looks for larger pieces of free memory, and they can take long to get: right after
files that were copied in small pieces were deleted, 2.2 GB took 2.2 s in writes of 4 MiB, and 1.6 s in these."""

_TO_DISK = 16 * 1024 * 1024
"""Bytes after which the disk may begin with them."""

_BUFFER = 4 * 1024 * 1024
"""Bytes held where the system cannot move them between files itself."""

_NO_PREALLOCATION = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})


class CopyRun(NamedTuple):
    """`nbytes` bytes from byte `source_start` of one file to byte `start` of another."""

    start: int
    source_start: int
    nbytes: int


class ShardWriter:
    """A new safetensors file at `path` that will hold `entries`; a context manager.

    - `tensors`: where each tensor lies, by name, in the order of their bytes (see `encode_header`)
    - `file_size`: bytes of the whole file
    - `written`: how far it is written; what is below its mark never changes again, and may be read
    - `on_bytes`: called with the number of bytes after each write, from the thread that wrote
    - `head`: the file's first bytes and its tensors, where they are given and not laid out here; `entries` then count for nothing,
      and `file_size`, where it is given, is that of the file, which has zeros where none of its tensors is

    Entering creates the file, with the mode that the umask leaves and of its full size, and reserves its space. Leaving without an
    error closes it: every byte of every tensor must have been written exactly once, and is on disk after. Leaving by an error
    closes the descriptor, ends all waiting and leaves an unfinished file. Tensors may be written from several threads.

    Raises `OutputError` where the file exists, the space does not, or writing fails.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[TensorSpec | tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = PT_METADATA,
        *,
        on_bytes: Callable[[int], None] | None = None,
        head: tuple[bytes, Sequence[TensorInfo]] | None = None,
        file_size: int | None = None,
    ) -> None:
        self.path = path
        self._header, infos = encode_header(entries, metadata, path) if head is None else head
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in infos}
        stop = infos[-1].stop if infos else len(self._header)
        self.file_size = stop if file_size is None else max(stop, file_size)
        self._on_bytes = on_bytes
        self.written = WrittenBytes()
        self._coverage = Coverage()
        self._in_memory = 0
        self._lock = threading.Lock()
        self._fd = -1

    def __enter__(self) -> Self:
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as cause:
            raise output_fault(cause, self.path, self.file_size) from cause
        try:
            self._preallocate()
            self._pwrite(memoryview(self._header), 0)
        except BaseException:
            self._abandon()
            raise
        self.written.add(0, len(self._header))
        end = len(self._header)
        for info in self.tensors.values():
            self.written.add(end, info.start)
            end = max(end, info.stop)
        self.written.add(end, self.file_size)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if exc_type is None:
            self.close()
        else:
            self._abandon()
            self.written.end()

    def write(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        """Write `view` at byte `offset` of the tensor `info` of this file.

        Raises `OutputError` where it does not fit into the tensor, was written before, or cannot be written.
        """
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        self._claim(info, offset, len(view))
        self._pwrite(view, info.start + offset)
        self._done(info.start + offset, len(view))

    def place(self, info: TensorInfo, offset: int, nbytes: int) -> tuple[int, int]:
        """The descriptor, and the byte of the file, at which others may write `nbytes` bytes, byte `offset` of the tensor `info`.

        `wrote` must be told what they wrote, before anything is read there. Raises `OutputError` where it does not fit.
        """
        self._fits(info, offset, nbytes)
        return self._fd, info.start + offset

    def wrote(self, info: TensorInfo, offset: int, nbytes: int) -> None:
        """Others wrote `nbytes` bytes at byte `offset` of the tensor `info`. Raises `OutputError` as `write` does."""
        if nbytes:
            self._claim(info, offset, nbytes)
            self._done(info.start + offset, nbytes)

    def copy(self, info: TensorInfo, source: TensorFile, source_info: TensorInfo) -> None:
        """Fill the tensor `info` of this file with the bytes of `source_info` in `source`.

        Raises `OutputError` where their sizes differ, and as `write` does; `CheckpointError` where the source cannot be read.
        """
        self.copy_all([(info, source_info)], source)

    def copy_all(self, pairs: Sequence[tuple[TensorInfo, TensorInfo]], source: TensorFile) -> None:
        """Fill several tensors of this file, each with the bytes of its partner in `source`. Raises as `copy` does."""
        for run in self.copy_runs(pairs):
            self.copy_run(run, source)

    def copy_runs(self, pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> list[CopyRun]:
        """What `copy_run` must be called with, once each, to fill tensors of this file with their partners of another.

        Neighbours here that are neighbours there, in the same order, move together; a run is some megabytes at most.

        Raises `OutputError` where two sizes differ.
        """
        whole: list[CopyRun] = []
        for info, source_info in sorted(pairs, key=lambda pair: pair[0].start):
            if info.nbytes != source_info.nbytes:
                raise OutputError(f"{self._where(info)} takes {info.nbytes} bytes, its source has {source_info.nbytes}")
            self._claim(info, 0, info.nbytes)
            last = whole[-1] if whole else CopyRun(-1, -1, 0)
            if (last.start + last.nbytes, last.source_start + last.nbytes) == (info.start, source_info.start):
                whole[-1] = last._replace(nbytes=last.nbytes + info.nbytes)
            else:
                whole.append(CopyRun(info.start, source_info.start, info.nbytes))
        return [
            CopyRun(run.start + done, run.source_start + done, min(_CHUNK, run.nbytes - done))
            for run in whole
            for done in range(0, run.nbytes, _CHUNK)
        ]

    def copy_run(self, run: CopyRun, source: TensorFile) -> None:
        """Move the bytes of `run` from `source` to this file.

        Raises as `copy` does, and `OutputError` where bytes below the mark would be written again.
        """
        if run.nbytes and run.start < self.written.mark:
            raise OutputError(f"{printable(str(self.path))}: bytes {run.start} and after would be written twice")
        done = 0
        while done < run.nbytes:
            start, source_start, rest = run.start + done, run.source_start + done, run.nbytes - done
            count = self._kernel_copy(start, source, source_start, rest)
            if count == 0:  # refused, or the source has ended: reading says which
                count = self._buffered_copy(start, source, source_start, rest)
            done += count
            self._done(start, count)

    def close(self) -> None:
        """Finish the file: check that it is complete, and bring it to the disk.

        Raises `OutputError` naming the first tensor that is not complete, or where the disk refuses.
        """
        try:
            for info in self.tensors.values():
                gap = self._coverage.first_gap(info.start, info.stop)
                if gap is not None:
                    raise OutputError(
                        f"{self._where(info)} is not complete: byte {gap - info.start} of {info.nbytes} was never written"
                    )
            try:
                os.fsync(self._fd)
                fd, self._fd = self._fd, -1
                os.close(fd)
            except OSError as cause:
                raise output_fault(cause, self.path, self.file_size) from cause
        finally:
            self._abandon()

    def _preallocate(self) -> None:
        try:
            os.ftruncate(self._fd, self.file_size)  # known to readers from the start, also where no space can be reserved
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self.file_size)
        except OSError as cause:
            if cause.errno not in _NO_PREALLOCATION:
                raise output_fault(cause, self.path, self.file_size) from cause

    def _fits(self, info: TensorInfo, offset: int, nbytes: int) -> None:
        if self._fd < 0:
            raise OutputError(f"{self._where(info)} cannot be written: the file is closed")
        if self.tensors.get(info.name) != info or offset < 0 or offset + nbytes > info.nbytes:
            raise OutputError(f"{self._where(info)} has no bytes {offset} to {offset + nbytes}")

    def _claim(self, info: TensorInfo, offset: int, nbytes: int) -> None:
        self._fits(info, offset, nbytes)
        with self._lock:
            fresh = self._coverage.add(info.start + offset, info.start + offset + nbytes)
        if not fresh:
            raise OutputError(f"{self._where(info)} would be written twice, at bytes {offset} to {offset + nbytes}")

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._fd, view[done : done + _AT_ONCE], offset + done)
            except OSError as cause:
                raise output_fault(cause, self.path, self.file_size) from cause

    def _kernel_copy(self, start: int, source: TensorFile, source_start: int, nbytes: int) -> int:
        """Bytes that the system moved itself; 0 where it cannot."""
        try:
            return kernel_copy(source.fileno(), self._fd, nbytes, source_start, start)
        except OSError as cause:
            raise output_fault(cause, self.path, self.file_size) from cause

    def _buffered_copy(self, start: int, source: TensorFile, source_start: int, nbytes: int) -> int:
        view = memoryview(bytearray(min(nbytes, _BUFFER)))
        source.read_into(source_start, view)
        self._pwrite(view, start)
        return len(view)

    def _done(self, start: int, nbytes: int) -> None:
        self.written.add(start, start + nbytes)
        with self._lock:
            self._in_memory += nbytes
            due = self._in_memory >= _TO_DISK
            self._in_memory = 0 if due else self._in_memory
        if due:
            start_writeback(self._fd)
        if self._on_bytes is not None and nbytes:
            self._on_bytes(nbytes)

    def _where(self, info: TensorInfo) -> str:
        return f"{printable(str(self.path))}: tensor '{printable(info.name)}'"

    def _abandon(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):
                os.close(fd)

"""Reading tensors of one safetensors file by position, as much at a time as is asked for.

The file is never mapped: one that shrinks while it is mapped kills the process, one that is read gives an error. Reading is
safe from several threads at once, for nothing here has a position of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ...errors import CheckpointError, printable
from ..regular import open_regular
from .buffers import bytes_of, tensor_over
from .info import FileIdentity, Header, TensorInfo

Until = Callable[[int], None]
"""Called with an offset of a file that is being written: returns when all before it is written, raises where that never comes."""


class TensorFile:
    """The open file that `header` was read from; a context manager that holds one descriptor.

    - `until`: of a file that is still being written; each read waits for its bytes

    Entering raises `CheckpointError` where the file is not the one whose header was read, or has changed since; so does leaving
    without an error, for what was read in between. The time of change of a file that is being written counts from when its last
    byte is read.
    """

    def __init__(self, header: Header, *, until: Until | None = None) -> None:
        self.header = header
        self._until = until
        self._identity = header.identity
        self._timed = until is None
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd, _ = open_regular(self.header.path, error=CheckpointError)
        try:
            self.check_unchanged()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if exc_type is None:
                self.check_unchanged()
        finally:
            self._close()

    def fileno(self) -> int:
        """The descriptor, for the system calls that move bytes between files."""
        return self._fd

    def check_unchanged(self) -> None:
        """Raises `CheckpointError` where size, time of change, inode or device are no longer the header's."""
        before, now = self._identity, FileIdentity.of(os.fstat(self._fd))
        for field in ("device", "inode", "size", "mtime_ns") if self._timed else ("device", "inode", "size"):
            if getattr(before, field) != getattr(now, field):
                raise CheckpointError(
                    f"{self._shown} has changed since its header was read:"
                    f" its {field} was {getattr(before, field)}, is {getattr(now, field)}",
                    hint="see that nothing else writes to it, and run again",
                )

    def wait(self, stop: int) -> None:
        """Return when all bytes before `stop` are there to be read, at once where the file is whole. Raises what `until` raises."""
        if self._until is not None:
            self._follow(self._until, stop)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes that begin at `offset` of the file.

        Raises `CheckpointError` where the file ends before, or cannot be read; and what `until` raises.
        """
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        self.wait(offset + len(view))
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as cause:
                raise CheckpointError(f"{self._shown} cannot be read at byte {offset + done}: {cause.strerror}") from cause
            if count == 0:
                raise CheckpointError(
                    f"{self._shown} was truncated while it was read: it ends at byte {os.fstat(self._fd).st_size},"
                    f" expected {self.header.file_size}"
                )
            done += count

    def read(self, info: TensorInfo, *, buffer: bytearray | memoryview | None = None) -> Tensor:
        """The tensor `info` of this file, of its shape and dtype, in new memory or over the first bytes of `buffer`.

        Raises `CheckpointError` where it cannot be read, or torch has no such dtype.
        """
        return self._read(info, info.shape, info.start, buffer)

    def read_rows(self, info: TensorInfo, start: int, count: int, *, buffer: bytearray | memoryview | None = None) -> Tensor:
        """Rows `start` to `start + count` of the tensor `info`: (count, …), in new memory or over the first bytes of `buffer`.

        A scalar counts as one row, and comes back with its own shape ().

        Raises `CheckpointError` as `read` does, and where there are no such rows.
        """
        rows = info.shape[0] if info.shape else 1
        if start < 0 or count < 0 or start + count > rows:
            raise CheckpointError(f"{self._where(info)} has {rows} rows, not {start} to {start + count}")
        row_bytes = info.nbytes // rows if rows else 0
        shape = (count, *info.shape[1:]) if info.shape else ()
        if not info.shape and count == 0:
            shape = (0,)
        return self._read(info, shape, info.start + start * row_bytes, buffer)

    def _read(self, info: TensorInfo, shape: tuple[int, ...], offset: int, buffer: bytearray | memoryview | None) -> Tensor:
        dtype = info.torch_dtype
        if dtype is None:
            raise CheckpointError(
                f"{self._where(info)} is of type {printable(info.dtype)}, which torch {torch.__version__} cannot hold"
            )
        try:
            tensor = torch.empty(shape, dtype=dtype, device="cpu") if buffer is None else tensor_over(buffer, dtype, shape)
        except (RuntimeError, ValueError) as cause:
            raise CheckpointError(
                f"{self._where(info)} of shape {list(shape)} cannot be held: {str(cause).splitlines()[0]}"
            ) from cause
        self.read_into(offset, bytes_of(tensor))
        return tensor

    def _follow(self, until: Until, stop: int) -> None:
        """Wait until all before `stop` is written; from when that is the whole file, nothing may change it."""
        until(stop)
        if stop == self.header.file_size and not self._timed:
            self.check_unchanged()
            self._identity, self._timed = FileIdentity.of(os.fstat(self._fd)), True

    @property
    def _shown(self) -> str:
        return printable(str(self.header.path))

    def _where(self, info: TensorInfo) -> str:
        return f"{self._shown}: tensor '{printable(info.name)}'"

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

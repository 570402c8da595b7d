"""Reading the numbers of a base checkpoint: a few rows at a time, of tensors as they are stored or of expressions of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ..files.evaluation import evaluate, rows_of
from ..files.expression import Matrix
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile
from .checkpoint import Checkpoint


class BaseReader:
    """The files of a checkpoint, open for reading; a context manager.

    Entering raises `CheckpointError` where one is not the file whose header was read, leaving where one changed meanwhile.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, TensorFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for shard in self._checkpoint.shards:
                self._files[shard.path] = stack.enter_context(TensorFile(shard.header))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def file(self, info: TensorInfo) -> TensorFile | None:
        """The open file that the tensor `info` is stored in; None where that is none of these."""
        return self._files.get(info.path)

    def read(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        """The stored tensor `info`, or slices of one, in new memory or over the first bytes of `buffer`.

        Raises `CheckpointError` where it cannot be read, or torch has no such dtype.
        """
        return self._files[info.path].read(info, buffer=buffer)

    def rows(self, matrix: Matrix, start: int, count: int) -> Tensor:
        """Rows of `matrix`, from row `start` of its first dimension on: (count, numbers of a row). Raises as `read` does."""
        columns = matrix.numel // max(1, matrix.shape[0] if matrix.shape else 1)
        return evaluate(rows_of(matrix, start, count, columns), self.read).contiguous()

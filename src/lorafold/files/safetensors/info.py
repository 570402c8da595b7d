"""What is known of one safetensors file without reading its tensors, as values."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import TORCH_DTYPES


class TensorSpec(NamedTuple):
    """A tensor to be laid out in a file: `dtype` is safetensors' name; `nbytes` is needed only where that type is unknown."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` of the file at `path`; `dtype` is safetensors' name for its elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    path: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Elements of the tensor; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """torch's type for the elements; None where it has none, so that the tensor can be copied but not computed with."""
        return TORCH_DTYPES.get(self.dtype)

    @property
    def spec(self) -> TensorSpec:
        """The same tensor, to be laid out in another file."""
        return TensorSpec(self.name, self.dtype, self.shape, self.nbytes)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file it was, and in what state: the same file unchanged gives an equal value."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity in a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True, slots=True)
class Header:
    """What the head of a safetensors file says.

    - `tensors`: by name, in the order of their bytes
    - `metadata`: the file's own remarks
    - `data_start`: offset of the first tensor's first byte; `file_size`: bytes in all
    - `sha256`: of the length field and the header's text, as hexadecimal
    - `identity`: the file that was read
    - `held`: the tensors themselves, where there is no file but memory (see `memory`); None: in the file
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    sha256: str
    identity: FileIdentity
    held: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)

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
    """What the header of a safetensors file says.

    - `tensors`: by name, in the order of their bytes
    - `metadata`: the file's own metadata
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


BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by safetensors' name; a name that is not here is a type that this version does not know."""

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}
"""torch's type by safetensors' name, where this torch has one with the same element (F4 has none: torch packs it in pairs)."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""safetensors' name by torch's type."""


def bytes_for(dtype: str, numel: int) -> int | None:
    """The bytes that `numel` elements of `dtype` take; None where the type is unknown or they do not end on a whole byte.

    >>> bytes_for("BF16", 3), bytes_for("F4", 4), bytes_for("F4", 3), bytes_for("X9", 3)
    (6, 2, None, None)
    """
    bits = BITS.get(dtype)
    if bits is None or bits * numel % 8:
        return None
    return bits * numel // 8

"""Tensors in memory, to be read as those of a safetensors file are: the same header, the same reader, and no file."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ...errors import CheckpointError, printable
from .buffers import bytes_of
from .header import encode_header
from .info import NAMES, FileIdentity, Header
from .reader import TensorFile


def memory_header(tensors: Mapping[str, Tensor], path: Path) -> Header:
    """The header of a file that would hold `tensors` as they are now; `path` is what errors call it.

    They are copied, so that what is read later are the numbers of this moment.

    Raises `CheckpointError` where one has no numbers or a type that such files have no name for.
    """
    held = {name: _copy(name, tensor, path) for name, tensor in tensors.items()}
    raw, infos = encode_header([(name, NAMES[t.dtype], tuple(t.shape)) for name, t in held.items()], path=path)
    size = max((info.stop for info in infos), default=len(raw))
    return Header(
        path=path,
        tensors={info.name: info for info in infos},
        metadata={"format": "pt"},
        data_start=len(raw),
        file_size=size,
        sha256=hashlib.sha256(raw).hexdigest(),
        identity=FileIdentity(size, 0, 0, 0),
        held={info.name: held[info.name] for info in infos},
    )


def opened(header: Header) -> TensorFile:
    """What reads the tensors of `header`: the open file, or what is in memory."""
    return TensorFile(header) if header.held is None else TensorsInMemory(header)


def digest(header: Header, *more: bytes) -> str:
    """SHA-256 of `more`, the header and the bytes of all tensors in memory, hexadecimal."""
    found = hashlib.sha256(header.sha256.encode())
    for part in more:
        found.update(part)
    for tensor in (header.held or {}).values():
        found.update(bytes_of(tensor))
    return found.hexdigest()


class TensorsInMemory(TensorFile):
    """As `TensorFile`, for a header that `memory_header` made."""

    def __enter__(self) -> Self:
        self._starts = [info.start for info in self.header.tensors.values()]
        self._tensors = list((self.header.held or {}).values())
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def check_unchanged(self) -> None:
        """Nothing: the copies are nobody else's."""

    def read_into(self, offset: int, view: memoryview) -> None:
        view = view.cast("B") if view.format != "B" or view.ndim != 1 else view
        if not len(view):
            return
        index = bisect_right(self._starts, offset) - 1
        while index > 0 and not self._tensors[index].numel():  # empty ones begin where the next does
            index -= 1
        start = offset - self._starts[index]
        view[:] = bytes_of(self._tensors[index])[start : start + len(view)]


def _copy(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.is_meta:
        raise CheckpointError(f"{printable(str(path))}: tensor '{printable(name)}' is on the meta device: it has no numbers")
    if tensor.dtype not in NAMES:
        raise CheckpointError(
            f"{printable(str(path))}: tensor '{printable(name)}' is of {tensor.dtype}, which has no name in files"
        )
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

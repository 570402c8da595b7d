"""Laying out a GGUF file: the bytes of its header, and where each tensor will lie."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import OutputError, printable
from ..safetensors.info import TensorInfo
from .ggml_types import GGML_TYPES
from .gguf_header import MAGIC, GgufHeader

_STRING, _U32, _F32 = 8, 4, 6


class GgufSpec(NamedTuple):
    """A tensor to be laid out: its name, ggml's number of its type, its shape with the slowest dimension first."""

    name: str
    kind: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        kind = GGML_TYPES[self.kind]
        return math.prod(self.shape) // kind.numel * kind.nbytes


class GgufLayout(NamedTuple):
    """The first bytes of a file, up to its tensors; these, in the order of their bytes; and the size of the whole file."""

    head: bytes
    tensors: tuple[TensorInfo, ...]
    file_size: int


def gguf_layout(
    pairs: Iterable[bytes], specs: Sequence[GgufSpec], path: Path = Path(), *, alignment: int = 32, version: int = 3
) -> GgufLayout:
    """The layout of the file at `path` with `pairs`, each as its bytes, and the tensors `specs`, one after another, all aligned.

    Raises `OutputError` where a name is given twice.

    >>> found = gguf_layout([text_pair("general.architecture", "llama")], [GgufSpec("a", 0, (3,)), GgufSpec("b", 8, (2, 32))])
    >>> [(info.name, info.dtype, info.start - len(found.head), info.nbytes) for info in found.tensors], len(found.head) % 32
    ([('a', 'F32', 0, 12), ('b', 'Q8_0', 32, 68)], 0)
    """
    if len({spec.name for spec in specs}) != len(specs):
        raise OutputError(f"{printable(str(path))} cannot hold two tensors of one name")
    pairs = list(pairs)
    parts = [MAGIC, struct.pack("<IQQ", version, len(specs), len(pairs)), *pairs]
    offset, offsets = 0, []
    for spec in specs:
        dims = spec.shape[::-1]
        parts += [_text(spec.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims), struct.pack("<IQ", spec.kind, offset)]
        offsets.append(offset)
        offset = aligned(offset + spec.nbytes, alignment)
    head = b"".join(parts)
    head += b"\0" * (aligned(len(head), alignment) - len(head))
    infos = [
        TensorInfo(spec.name, GGML_TYPES[spec.kind].name, spec.shape, len(head) + at, len(head) + at + spec.nbytes, path)
        for spec, at in zip(specs, offsets, strict=True)
    ]
    return GgufLayout(head, tuple(infos), len(head) + offset)


def text_pair(key: str, text: str) -> bytes:
    """The pair of `key` and `text`."""
    return _text(key) + struct.pack("<I", _STRING) + _text(text)


def number_pair(key: str, number: int | float) -> bytes:
    """The pair of `key` and `number`, an unsigned integer of 32 bits, or a float32."""
    return _text(key) + (struct.pack("<If", _F32, number) if isinstance(number, float) else struct.pack("<II", _U32, number))


def gaps(header: GgufHeader) -> list[tuple[int, int]]:
    """The bytes of the file of `header` after its header that are of no tensor: from and to."""
    found, end = [], header.data_start
    for info in header.tensors.values():
        if info.start > end:
            found.append((end, info.start))
        end = max(end, info.stop)
    return [*found, (end, header.file_size)] if header.file_size > end else found


def aligned(size: int, alignment: int = 32) -> int:
    """`size`, or the next multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw

"""Laying out a safetensors file: its header's bytes and where each tensor will lie, before anything is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import OutputError, printable
from .dtypes import BITS, bytes_for
from .header import MAX_HEADER_BYTES
from .info import TensorInfo, TensorSpec

PT_METADATA: Mapping[str, str] = {"format": "pt"}
"""The remark without which transformers does not load a file."""


def encode_header(
    entries: Sequence[TensorSpec | tuple[str, str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = PT_METADATA,
    path: Path = Path(),
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The first bytes of the file at `path`, up to its tensors, and its tensors in the order of their bytes.

    The order is that of `entries`, unless an element would then lie at an offset that its width does not divide (readers that
    map the file need that): then wider elements come first, and the order within one width stays. The header is padded with
    spaces to a multiple of 8 bytes.

    Raises `OutputError` where a name is given twice or a size cannot be known.

    >>> header, tensors = encode_header([("a", "U8", (3,)), ("b", "F32", (2, 1))])
    >>> [(t.name, t.start - len(header), t.nbytes) for t in tensors]
    [('b', 0, 8), ('a', 8, 3)]
    """
    specs = [TensorSpec(*entry) for entry in entries]
    sizes = {spec.name: _size(spec, path) for spec in specs}
    if len(sizes) != len(specs) or "__metadata__" in sizes:
        names = [spec.name for spec in specs]
        twice = next((name for name in names if names.count(name) > 1), "__metadata__")
        raise OutputError(f"{printable(str(path))} cannot hold the tensor '{printable(twice)}': the name is taken")
    specs = _aligned(specs, sizes)

    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(metadata)
    position = 0
    for spec in specs:
        stop = position + sizes[spec.name]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(f"{printable(str(path))}: its header would have {len(text)} bytes, the format allows {MAX_HEADER_BYTES}")
    raw = struct.pack("<Q", len(text)) + text

    infos = []
    position = len(raw)
    for spec in specs:
        stop = position + sizes[spec.name]
        infos.append(TensorInfo(spec.name, spec.dtype, tuple(spec.shape), position, stop, path))
        position = stop
    return raw, tuple(infos)


def _size(spec: TensorSpec, path: Path) -> int:
    numel = 1
    for dim in spec.shape:
        numel *= dim
    size = bytes_for(spec.dtype, numel)
    if size is None and spec.dtype not in BITS:
        size = spec.nbytes
    if size is None or (spec.nbytes is not None and spec.nbytes != size):
        raise OutputError(
            f"{printable(str(path))} cannot hold the tensor '{printable(spec.name)}':"
            f" {list(spec.shape)} of {printable(spec.dtype)} in {spec.nbytes} bytes, expected {size}"
        )
    return size


def _aligned(specs: list[TensorSpec], sizes: Mapping[str, int]) -> list[TensorSpec]:
    position = 0
    for spec in specs:
        width = max(BITS.get(spec.dtype, 8) // 8, 1)  # bytes; smaller elements are packed into bytes
        if sizes[spec.name] and position % width:
            return sorted(specs, key=lambda each: -BITS.get(each.dtype, 8))
        position += sizes[spec.name]
    return specs

"""Reading the header of a safetensors file, and believing none of it.

The format: eight bytes that hold the header's length N (little-endian), N bytes of JSON, and the tensors' bytes without gap or
overlap to the end of the file (safetensors, README.md, "Format"). Every contradiction is an error that names the file; no
tensor is read here.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, OutputError, printable
from .. import strictjson
from ..regular import open_regular
from .info import BITS, FileIdentity, Header, TensorInfo, TensorSpec, bytes_for

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the reference implementation reads."""

MAX_METADATA_BYTES = 32 * 1024 * 1024
"""The most text that a file may say of itself beside its tensors; pictures and trainers' statistics take some megabytes."""

MAX_TENSORS = 500_000
"""The most tensors that a file may name; the largest models have some tens of thousands in all."""


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`.

    Raises `CheckpointError` where the file cannot be read, is not of this format, contradicts itself, or is longer or shorter
    than its header says.
    """
    fd, status = open_regular(path, error=CheckpointError)
    try:
        raw = _raw_header(fd, path, status.st_size)
    except OSError as cause:
        raise CheckpointError(f"{printable(str(path))} cannot be read: {cause.strerror}") from cause
    finally:
        os.close(fd)
    parsed = strictjson.parse(raw[8:], str(path), error=CheckpointError)
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{printable(str(path))}: the header must be a JSON object, not {_kind(parsed)}")
    metadata = _metadata(parsed.pop("__metadata__", None), path)
    infos = sorted(_tensors(parsed, path, len(raw)), key=lambda info: (info.start, info.stop))
    _check_cover(infos, path, len(raw), status.st_size)
    return Header(
        path=path,
        tensors={info.name: info for info in infos},
        metadata=metadata,
        data_start=len(raw),
        file_size=status.st_size,
        sha256=hashlib.sha256(raw).hexdigest(),
        identity=FileIdentity.of(status),
    )


def parse_header(raw: bytes, path: Path) -> tuple[TensorInfo, ...]:
    """The tensors of a file whose header, up to its tensors, is `raw`, in the order of their bytes, as if the file were at `path`.

    Raises `CheckpointError` as `read_header` does; where the file ends is not known here.
    """
    if len(raw) < 10 or struct.unpack("<Q", raw[:8])[0] != len(raw) - 8:
        raise CheckpointError(f"{printable(str(path))}: {len(raw)} bytes are not the header of a safetensors file")
    parsed = strictjson.parse(raw[8:], str(path), error=CheckpointError)
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{printable(str(path))}: the header must be a JSON object, not {_kind(parsed)}")
    _metadata(parsed.pop("__metadata__", None), path)
    infos = sorted(_tensors(parsed, path, len(raw)), key=lambda info: (info.start, info.stop))
    end = infos[-1].stop if infos else len(raw)
    _check_cover(infos, path, len(raw), end)
    return tuple(infos)


def _raw_header(fd: int, path: Path, file_size: int) -> bytes:
    shown = printable(str(path))
    if file_size < 8:
        raise CheckpointError(f"{shown} is not a safetensors file: it has {file_size} bytes, the shortest possible has 10")
    field = os.pread(fd, 8, 0)
    (length,) = struct.unpack("<Q", field)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shown}: the header is said to have {length} bytes, more than the {MAX_HEADER_BYTES} that the format allows",
            hint="is this a safetensors file?",
        )
    if 8 + length > file_size:
        raise CheckpointError(
            f"{shown}: the header is said to end at byte {8 + length}, but the file has {file_size} bytes",
            hint="the file is truncated, or not a safetensors file",
        )
    text = bytearray()
    while len(text) < length:
        chunk = os.pread(fd, length - len(text), 8 + len(text))
        if not chunk:
            raise CheckpointError(f"{shown} was truncated while it was read: expected {8 + length} bytes of header")
        text += chunk
    if text[:1] != b"{":
        raise CheckpointError(
            f"{shown}: the header begins with {bytes(text[:1])!r}, expected b'{{'", hint="is this a safetensors file?"
        )
    # A tensor takes one brace, two brackets and some commas: counted before the parser makes an object of each.
    for mark, most in ((b"{", MAX_TENSORS + 2), (b"[", 2 * MAX_TENSORS), (b",", 16 * MAX_TENSORS)):
        if text.count(mark) > most:
            raise CheckpointError(f"{shown}: the header names more than the {MAX_TENSORS} tensors that a file may hold")
    return field + bytes(text)


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        found = _kind(value) if not isinstance(value, dict) else f"{printable(str(value))[:200]}"
        raise CheckpointError(f"{printable(str(path))}: __metadata__ must map text to text, found {found}")
    size = sum(len(name) + len(text) for name, text in value.items())
    if size > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{printable(str(path))}: __metadata__ has {size} characters, more than the {MAX_METADATA_BYTES} that are read of it"
        )
    return value


def _tensors(parsed: dict[str, Any], path: Path, data_start: int) -> Iterator[TensorInfo]:
    if len(parsed) > MAX_TENSORS:
        raise CheckpointError(f"{printable(str(path))}: the header names {len(parsed)} tensors, more than {MAX_TENSORS}")
    for name, entry in parsed.items():
        where = f"{printable(str(path))}: tensor '{printable(name)}'"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            found = _kind(entry) if not isinstance(entry, dict) else ", ".join(printable(key) for key in sorted(entry)[:8])
            raise CheckpointError(f"{where} must have dtype, shape and data_offsets, found {found or 'nothing'}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            raise CheckpointError(f"{where}: dtype must be text, not {_kind(dtype)}")
        if not _is_counts(shape):
            raise CheckpointError(f"{where}: shape must be a list of numbers from 0 to 2^63 − 1, found {_short(shape)}")
        if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(f"{where}: data_offsets must be two rising byte offsets, found {_short(offsets)}")
        _check_size(where, dtype, shape, offsets[1] - offsets[0])
        yield TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1], path)


def _check_size(where: str, dtype: str, shape: list[int], found: int) -> None:
    numel = 1
    for dim in shape:
        numel *= dim
        if numel >= 2**63:
            raise CheckpointError(f"{where}: the shape {_short(shape)} has more elements than can be addressed")
    if dtype not in BITS:
        return  # its bytes can be copied all the same
    expected = bytes_for(dtype, numel)
    if expected is None:
        raise CheckpointError(f"{where}: {numel} elements of {dtype} do not end on a whole byte")
    if expected != found:
        raise CheckpointError(f"{where}: {_short(shape)} of {dtype} takes {expected} bytes, data_offsets give it {found}")


def _check_cover(infos: list[TensorInfo], path: Path, data_start: int, file_size: int) -> None:
    """The tensors lie one after the other from the header to the end of the file."""
    position = data_start
    for info in infos:
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{printable(str(path))}: tensor '{printable(info.name)}' {what}:"
                f" it begins at offset {info.start - data_start}, expected {position - data_start}"
            )
        position = info.stop
    if position != file_size:
        what = "truncated" if file_size < position else "longer than its header says"
        raise CheckpointError(
            f"{printable(str(path))} is {what}: expected {position} bytes, found {file_size}",
            hint="copy or download the file again",
        )


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 120 else text[:100] + "…"


PT_METADATA: Mapping[str, str] = {"format": "pt"}
"""The metadata field without which transformers does not load a file."""


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

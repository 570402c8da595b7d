"""The header of a GGUF file, read strictly: key-value pairs, and where each tensor lies.

The format (ggml, `docs/gguf.md`): "GGUF", version, number of tensors, number of pairs; the pairs; the tensors' names, dimensions
(fastest first), types and offsets; then, aligned, their bytes. Only whole floats are read: F32, F16 and BF16.
"""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

from ....errors import AdapterError, UnsupportedAdapterError, printable
from ....files.regular import open_regular
from ....files.safetensors.info import BITS, FileIdentity, Header, TensorInfo

MAGIC = b"GGUF"
TYPES = {0: "F32", 1: "F16", 30: "BF16"}
"""The names that safetensors has for the types of elements that are read, by ggml's number."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_HEAD = 1 << 26
_MOST_ENTRIES = 1 << 20
_MOST_TEXT = 1 << 20


def read_gguf_header(path: Path) -> Header:
    """The header of the GGUF file at `path`; `metadata` has each pair as text, an array as its length in brackets.

    Raises `AdapterError` where the file contradicts itself, `UnsupportedAdapterError` for versions and types that are not read.
    """
    fd, status = open_regular(path, error=AdapterError)
    with open(fd, "rb") as file:
        raw = file.read(min(_MOST_HEAD, status.st_size))
    cursor = _Cursor(raw, printable(str(path)))
    if cursor.take(4) != MAGIC:
        raise AdapterError(f"{cursor.shown} is not a GGUF file")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise UnsupportedAdapterError(f"{cursor.shown} is GGUF of version {version}, expected 2 or 3 in little-endian order")
    tensors, pairs = cursor.count("tensors"), cursor.count("key-value pairs")
    metadata: dict[str, str] = {}
    for _ in range(pairs):
        key = cursor.text()
        value = cursor.value(cursor.number("<I"))
        if key in metadata:
            raise AdapterError(f"{cursor.shown}: the key '{printable(key)}' stands twice")
        metadata[key] = value if isinstance(value, str) else repr(value)
    entries = [_entry(cursor) for _ in range(tensors)]
    alignment = _alignment(metadata, cursor.shown)
    data_start = -(-cursor.at // alignment) * alignment
    infos = [_info(entry, data_start, alignment, status.st_size, path) for entry in entries]
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_apart(infos, cursor.shown)
    if len({info.name for info in infos}) != len(infos):
        raise AdapterError(f"{cursor.shown}: two tensors have the same name")
    return Header(
        path=path,
        tensors={info.name: info for info in infos},
        metadata=metadata,
        data_start=data_start,
        file_size=status.st_size,
        sha256=hashlib.sha256(raw[: cursor.at]).hexdigest(),
        identity=FileIdentity.of(status),
    )


class _Cursor:
    """A place in the header; whatever is taken from beyond its end is an error."""

    def __init__(self, raw: bytes, shown: str) -> None:
        self.raw = raw
        self.shown = shown
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.raw) - self.at:
            raise AdapterError(f"{self.shown} ends within its header, at byte {len(self.raw)}", hint="the file is damaged")
        self.at += count
        return self.raw[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, what: str) -> int:
        count = int(self.number("<Q"))
        if count > _MOST_ENTRIES:
            raise AdapterError(
                f"{self.shown} is said to hold {count} {what}, more than {_MOST_ENTRIES}", hint="the file is damaged"
            )
        return count

    def text(self) -> str:
        length = int(self.number("<Q"))
        if length > _MOST_TEXT:
            raise AdapterError(f"{self.shown}: a text is said to have {length} bytes", hint="the file is damaged")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise AdapterError(f"{self.shown}: a text in the header is not UTF-8", hint="the file is damaged") from None

    def value(self, kind: int) -> Any:
        """One value; of an array, ``"[n]"``."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise AdapterError(f"{self.shown}: a value of the unknown kind {kind}", hint="the file is damaged")
        inner, count = self.number("<I"), int(self.number("<Q"))
        if inner in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            if count > _MOST_ENTRIES:
                raise AdapterError(f"{self.shown}: an array is said to hold {count} texts", hint="the file is damaged")
            for _ in range(count):
                self.text()
        else:
            raise UnsupportedAdapterError(f"{self.shown}: an array of the kind {inner} is not read")
        return f"[{count}]"


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (slowest first), ggml's type and offset of one tensor."""
    name = cursor.text()
    dims = cursor.number("<I")
    if dims > 4:
        raise AdapterError(f"{cursor.shown}: tensor '{printable(name)}' is said to have {dims} dimensions, at most 4 are possible")
    shape = tuple(int(cursor.number("<Q")) for _ in range(dims))[::-1]
    return name, shape, int(cursor.number("<I")), int(cursor.number("<Q"))


def _alignment(metadata: dict[str, str], shown: str) -> int:
    text = metadata.get("general.alignment", "32")
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16 or int(text) & (int(text) - 1):
        raise AdapterError(f"{shown}: general.alignment must be a power of two, not {printable(text)[:40]}")
    return int(text)


def _info(entry: tuple[str, tuple[int, ...], int, int], data_start: int, alignment: int, file_size: int, path: Path) -> TensorInfo:
    name, shape, kind, offset = entry
    where = f"{printable(str(path))}: tensor '{printable(name)}'"
    dtype = TYPES.get(kind)
    if dtype is None:
        raise UnsupportedAdapterError(
            f"{where} is of ggml's type {kind}, expected F32, F16 or BF16",
            hint="quantised factors have lost what a merge needs; convert the adapter with outtype f32",
        )
    nbytes = math.prod(shape) * BITS[dtype] // 8
    start = data_start + offset
    if offset % alignment or start + nbytes > file_size:
        raise AdapterError(f"{where} lies at {start} with {nbytes} bytes, which the file of {file_size} does not hold there")
    return TensorInfo(name, dtype, shape, start, start + nbytes, path)


def _check_apart(infos: list[TensorInfo], shown: str) -> None:
    end = 0
    for info in infos:
        if info.start < end and info.nbytes:
            raise AdapterError(f"{shown}: tensor '{printable(info.name)}' overlaps the one before it", hint="the file is damaged")
        end = max(end, info.stop)

"""The header of a GGUF file, read strictly: key-value pairs, and where each tensor lies.

The format (ggml, `docs/gguf.md`): "GGUF", version, number of tensors, number of pairs; the pairs; the tensors' names, dimensions
(fastest first), types and offsets; then, aligned, their bytes, each aligned too. No size in it is believed before it is held
against the file's.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, InputError, printable
from ..regular import open_regular
from ..safetensors.info import FileIdentity, Header, TensorInfo
from .ggml_types import GGML_TYPES

MAGIC = b"GGUF"
RECEIPT_KEY = "lorafold.receipt"
"""The text that says what was merged into the file. It is written last, into room that was left for it: it has a hash of the
file, for which that room is blank."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LARGEST = 1 << 28
"""Bytes of the largest header that is read: a vocabulary takes some tens of megabytes."""

_MOST_ENTRIES = 1 << 21
_MOST_TEXT = 1 << 26
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufHeader(Header):
    """What the header of a GGUF file says, beside what that of any file of tensors does.

    - `tensors`: their `dtype` is ggml's name of the type, their shape has the slowest dimension first
    - `metadata`: each pair as text, an array as its length in brackets; `pairs`: each as its bytes, key and type included
    - `kinds`: ggml's number of each tensor's type
    - `blank`: the bytes of the file, from and to, that are the text of its receipt
    - `sha256`: of all before the first tensor, `blank` as spaces
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    pairs: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    alignment: int = 32
    version: int = 3
    blank: tuple[int, int] | None = None


def read_gguf_header(path: Path, *, error: type[InputError] = CheckpointError) -> GgufHeader:
    """The header of the GGUF file at `path`.

    Raises `error` where the file contradicts itself, or its version or a type in it is not known.
    """
    fd, status = open_regular(path, error=error)
    try:
        return _read(_Cursor(fd, status.st_size, printable(str(path)), error), path, FileIdentity.of(status))
    finally:
        os.close(fd)


def parse_gguf_header(raw: bytes, path: Path, file_size: int) -> GgufHeader:
    """The header of a file that begins with `raw` and has `file_size` bytes, as if it were at `path`.

    Raises `CheckpointError` as `read_gguf_header` does.
    """
    cursor = _Cursor(-1, file_size, printable(str(path)), CheckpointError)
    cursor.raw += raw
    return _read(cursor, path, FileIdentity(file_size, 0, 0, 0))


def is_gguf_file(path: Path) -> bool:
    """Whether the file at `path` begins as GGUF files do; False where it cannot be read.

    >>> is_gguf_file(Path("base/config.json"))
    False
    """
    try:
        fd, _ = open_regular(path)
        try:
            return os.pread(fd, 4, 0) == MAGIC
        finally:
            os.close(fd)
    except (InputError, OSError):
        return False


def blank_of(header: Header) -> tuple[int, int]:
    """The bytes of the file of `header`, from and to, that are the text of a receipt in it; none of a file in another format."""
    blank = header.blank if isinstance(header, GgufHeader) else None
    return blank or (0, 0)


def blanked(header: Header, start: int, view: memoryview) -> None:
    """Put spaces where `view`, the bytes of the file of `header` from `start` on, has text of its receipt."""
    low, high = (min(max(end - start, 0), len(view)) for end in blank_of(header))
    view[low:high] = b" " * (high - low)


class _Cursor:
    """A place in the header; whatever is taken from beyond its end is an error."""

    def __init__(self, fd: int, file_size: int, shown: str, error: type[InputError]) -> None:
        self.raw = bytearray()
        self.at = 0
        self.file_size = file_size
        self.shown = shown
        self.error = error
        self._fd = fd

    def fail(self, what: str, hint: str = "the file is damaged") -> InputError:
        """The error to raise for `what`."""
        return self.error(f"{self.shown}{what}", hint=hint)

    def need(self, stop: int) -> None:
        """Hold all before byte `stop` of the file."""
        if stop > self.file_size:
            raise self.fail(f" ends within its header, at byte {self.file_size}")
        if stop > _LARGEST:
            raise self.fail(f": the header is said to have more than {_LARGEST} bytes")
        while len(self.raw) < stop:
            if self._fd < 0:
                raise self.fail(f" ends within its header, at byte {len(self.raw)}")
            try:
                chunk = os.pread(self._fd, max(_CHUNK, min(stop, self.file_size) - len(self.raw)), len(self.raw))
            except OSError as cause:
                raise self.error(f"{self.shown} cannot be read: {cause.strerror}") from cause
            if not chunk:
                raise self.fail(f" was truncated while it was read: expected {stop} bytes of header")
            self.raw += chunk

    def take(self, count: int) -> bytes:
        self.skip(count)
        return bytes(self.raw[self.at - count : self.at])

    def skip(self, count: int) -> None:
        self.need(self.at + count)
        self.at += count

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = int(self.number("<Q"))
        if count > _MOST_ENTRIES or count * least > self.file_size - self.at:
            raise self.fail(f" is said to hold {count} {what}, more than fit into its {self.file_size} bytes")
        return count

    def text(self) -> str:
        length = int(self.number("<Q"))
        if length > _MOST_TEXT:
            raise self.fail(f": a text is said to have {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(": a text in the header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """One value; of an array, ``"[n]"``."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise self.fail(f": a value of the unknown kind {kind}")
        inner = self.number("<I")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            count = int(self.number("<Q"))
            if count * width > self.file_size - self.at:
                raise self.fail(f": an array is said to hold {count} numbers, more than fit into the file")
            self.skip(count * width)
        elif inner == _STRING:
            count = self.count("texts in an array", 8)
            for _ in range(count):
                self.need(self.at + 8)
                (length,) = _LENGTH.unpack_from(self.raw, self.at)
                if length > _MOST_TEXT:
                    raise self.fail(f": a text is said to have {length} bytes")
                self.skip(8 + length)
        else:
            raise self.fail(f": an array of the kind {inner} is not read")
        return f"[{count}]"


_LENGTH = struct.Struct("<Q")


def _read(cursor: _Cursor, path: Path, identity: FileIdentity) -> GgufHeader:
    if cursor.file_size < 24 or cursor.take(4) != MAGIC:
        raise cursor.error(f"{cursor.shown} is not a GGUF file")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.error(f"{cursor.shown} is GGUF of version {version}, expected 2 or 3 in little-endian order")
    tensors, count = cursor.count("tensors", 24), cursor.count("key-value pairs", 13)
    metadata: dict[str, str] = {}
    spans: dict[str, tuple[int, int]] = {}
    blank = None
    for _ in range(count):
        start, key, kind = cursor.at, cursor.text(), int(cursor.number("<I"))
        value = cursor.value(kind)
        if not key or key in metadata:
            raise cursor.fail(f": the key '{printable(key)}' {'stands twice' if key else 'is empty'}")
        metadata[key] = value if isinstance(value, str) else repr(value)
        spans[key] = (start, cursor.at)
        if key == RECEIPT_KEY and kind == _STRING:
            blank = (cursor.at - len(value.encode()), cursor.at)
    alignment = _alignment(metadata, cursor)
    entries = [_entry(cursor) for _ in range(tensors)]
    data_start = -(-cursor.at // alignment) * alignment if tensors else cursor.at
    infos = sorted((_info(each, data_start, alignment, cursor, path) for each in entries), key=lambda each: (each.start, each.stop))
    _check_apart(infos, cursor)
    if len({info.name for info in infos}) != len(infos):
        raise cursor.fail(": two tensors have the same name")
    if tensors:
        cursor.need(data_start)
    pairs = {key: bytes(cursor.raw[start:stop]) for key, (start, stop) in spans.items()}
    found = GgufHeader(
        path=path,
        tensors={info.name: info for info in infos},
        metadata=metadata,
        data_start=data_start,
        file_size=cursor.file_size,
        sha256="",
        identity=identity,
        kinds={name: kind for name, _, kind, _ in entries},
        pairs=pairs,
        alignment=alignment,
        version=version,
        blank=blank,
    )
    view = memoryview(cursor.raw)[:data_start]
    blanked(found, 0, view)
    return replace(found, sha256=hashlib.sha256(view).hexdigest())


_Entry = tuple[str, tuple[int, ...], int, int]
"""Name, shape (slowest first), ggml's number of the type and offset of one tensor."""


def _entry(cursor: _Cursor) -> _Entry:
    name = cursor.text()
    dims = cursor.number("<I")
    if dims > 4:
        raise cursor.fail(f": tensor '{printable(name)}' is said to have {dims} dimensions, at most 4 are possible")
    shape = tuple(int(cursor.number("<Q")) for _ in range(dims))[::-1]
    return name, shape, int(cursor.number("<I")), int(cursor.number("<Q"))


def _alignment(metadata: Mapping[str, str], cursor: _Cursor) -> int:
    text = metadata.get("general.alignment", "32")
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16 or int(text) & (int(text) - 1):
        raise cursor.fail(f": general.alignment must be a power of two, not {printable(text)[:40]}")
    return int(text)


def _info(entry: _Entry, data_start: int, alignment: int, cursor: _Cursor, path: Path) -> TensorInfo:
    name, shape, number, offset = entry
    where = f": tensor '{printable(name)}'"
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise cursor.fail(
            f"{where} is of ggml's type {number}, which is not known", "the file is damaged, or newer than this version"
        )
    numel = math.prod(shape)
    if numel >= 1 << 63:
        raise cursor.fail(f"{where}: the shape {list(shape)} has more elements than can be addressed")
    if (shape[-1] if shape else 1) % kind.numel:
        raise cursor.fail(f"{where} of type {kind.name} has rows of {shape[-1] if shape else 1}, expected blocks of {kind.numel}")
    nbytes, start = numel // kind.numel * kind.nbytes, data_start + offset
    if offset % alignment or start + nbytes > cursor.file_size:
        raise cursor.fail(f"{where} lies at {start} with {nbytes} bytes, which the file of {cursor.file_size} does not hold there")
    return TensorInfo(name, kind.name, shape, start, start + nbytes, path)


def _check_apart(infos: Sequence[TensorInfo], cursor: _Cursor) -> None:
    end = 0
    for info in infos:
        if info.start < end and info.nbytes:
            raise cursor.fail(f": tensor '{printable(info.name)}' overlaps the one before it")
        end = max(end, info.stop)

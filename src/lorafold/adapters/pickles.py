"""Files of `torch.save`, as a head like that of a safetensors file: names, types, shapes, and where the bytes lie.

Such a file is a zip archive of one pickle, which names the tensors, and one record of bytes for each storage, not compressed. torch
itself loads it, with `weights_only`, and decides what it holds; a second reading of the pickle, in which every name but those of
tensors and storages is refused, tells where each tensor's bytes lie; both must agree, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import AdapterError, UnsupportedAdapterError, printable
from ..files.regular import open_regular
from ..files.safetensors.buffers import bytes_of
from ..files.safetensors.info import NAMES, FileIdentity, Header, TensorInfo
from ..files.safetensors.reader import TensorFile

TORCH_NEEDED = (2, 10)
"""The first torch whose `weights_only` is trusted here."""

NESTED = ("model_state_dict", "state_dict", "model", "module")
"""Under which names training scripts put the dictionary of tensors into another one."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""The type of the elements, by the name of the class that torch.save writes for a storage."""

_MOST_PICKLE = 1 << 26
"""Bytes of the pickle in the archive that are read; it has about a hundred for each tensor."""


@dataclass(frozen=True)
class _Storage:
    """A record of the archive, as a tensor of the pickle names it."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _Place:
    """Where the pickle says that a tensor lies: elements from `offset` on of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickled(path: Path) -> Header:
    """The header of the file of torch.save at `path`: a dictionary of tensors, or one in a dictionary under a name of `NESTED`.

    Raises `UnsupportedAdapterError` on a torch before 2.10, and `AdapterError` where torch refuses to load the file, it holds
    anything else, or a tensor in it is not plain.
    """
    shown = printable(str(path))
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < TORCH_NEEDED:
        raise UnsupportedAdapterError(
            f"{shown} is a pickle, which is read with torch 2.10 or newer only; this is {torch.__version__}",
            hint="update torch, or save its tensors as .safetensors",
        )
    fd, status = open_regular(path, error=AdapterError)
    with open(fd, "rb") as file:
        raw, records = _archive(file, status.st_size, shown)
        places = _tensors_in(_places(raw, shown), _Place, shown)
    loaded = _tensors_in(_load(path, shown), Tensor, shown)
    if loaded.keys() != places.keys():
        raise AdapterError(f"{shown}: torch finds other tensors in it than its pickle names", hint="the file is damaged")
    infos = [_info(name, place, loaded[name], records, path) for name, place in places.items()]
    infos.sort(key=lambda info: (info.start, info.stop, info.name))
    header = Header(
        path=path,
        tensors={info.name: info for info in infos},
        metadata={},
        data_start=min((info.start for info in infos), default=0),
        file_size=status.st_size,
        sha256=hashlib.sha256(raw).hexdigest(),
        identity=FileIdentity.of(status),
    )
    _compare(header, loaded, shown)
    return header


def _archive(file: BinaryIO, size: int, shown: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle of the archive, and where the bytes of each storage lie: offset and length."""
    try:
        archive = zipfile.ZipFile(file)
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1 or len(entries) != len(archive.infolist()):
            raise AdapterError(f"{shown} is not a file of torch.save: it holds {len(pickles)} times data.pkl, expected once")
        root = pickles[0].removesuffix("data.pkl")
        order = entries.get(root + "byteorder")
        if order is not None and archive.read(order)[:16] != b"little":
            raise UnsupportedAdapterError(f"{shown} was saved on a machine of another byte order")
        if entries[pickles[0]].file_size > _MOST_PICKLE:
            raise AdapterError(f"{shown}: its pickle has {entries[pickles[0]].file_size} bytes, more than the {_MOST_PICKLE} read")
        raw = archive.read(pickles[0])
        records = {}
        for name, entry in entries.items():
            if not name.startswith(root + "data/"):
                continue
            if entry.compress_type != zipfile.ZIP_STORED:
                raise AdapterError(f"{shown}: the record {printable(name)} is compressed, which torch.save never does")
            records[name.removeprefix(root + "data/")] = (_data_offset(file, entry.header_offset), entry.file_size)
    except (zipfile.BadZipFile, OSError, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError) as cause:
        raise AdapterError(
            f"{shown} is not a file of torch.save since torch 1.6: {printable(str(cause))}",
            hint="load it where you trust it, and save its tensors as .safetensors",
        ) from None
    if any(start + length > size for start, length in records.values()):
        raise AdapterError(f"{shown} is truncated: its records end after its {size} bytes")
    return raw, records


def _data_offset(file: BinaryIO, header: int) -> int:
    """Where the bytes of a zip entry begin: after its local header of 30 bytes, its name and its extra field (APPNOTE 4.3.7)."""
    file.seek(header)
    fields = struct.unpack("<4s22xHH", file.read(30))
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("an entry has no header of its own")
    return header + 30 + int(fields[1]) + int(fields[2])


class _Placing(pickle.Unpickler):
    """Reads a pickle in which tensors become `_Place`; whatever else it names is refused, so that nothing of it is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) > 2 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise pickle.UnpicklingError("it names a storage that is none")
        return _Storage(pid[1], str(pid[2]))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Place:
    counts = [offset, *shape, *stride]
    if not isinstance(storage, _Storage) or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise pickle.UnpicklingError("a tensor has no storage, or a size that is none")
    return _Place(storage, offset, tuple(shape), tuple(stride))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _places(raw: bytes, shown: str) -> Any:
    import io

    try:
        return _Placing(io.BytesIO(raw)).load()
    except RecursionError:
        raise AdapterError(f"{shown}: its pickle nests too deeply") from None
    except Exception as cause:  # a damaged pickle raises whatever it likes
        raise AdapterError(
            f"{shown} holds more than tensors: {printable(str(cause))[:200]}",
            hint="it is not loaded; save its tensors as .safetensors where you trust it",
        ) from None


def _load(path: Path, shown: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as cause:  # whatever a damaged or hostile file leads to
        reason = printable(str(cause).splitlines()[0] if str(cause) else type(cause).__name__)
        raise AdapterError(
            f"{shown} is refused by torch.load(weights_only=True): {reason[:200]}",
            hint="it is not loaded; save its tensors as .safetensors where you trust it",
        ) from None


def _tensors_in(value: Any, kind: type, shown: str) -> dict[str, Any]:
    """The dictionary of tensors that `value` is or holds under a name of `NESTED`."""
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(inner := next(iter(value.items())), tuple):
        name, held = inner
        if name in NESTED and isinstance(held, Mapping):
            value = held
    if not isinstance(value, Mapping):
        raise AdapterError(f"{shown} must hold a dictionary of tensors, not {type(value).__name__}")
    for name, held in value.items():
        if not isinstance(name, str) or not isinstance(held, kind):
            what = f"'{printable(str(name))[:80]}'"
            raise AdapterError(
                f"{shown}: the entry {what} must be a tensor, found {type(held).__name__.strip('_')}",
                hint=f"a dictionary of tensors is read, alone or under {', '.join(NESTED)}",
            )
    return dict(value)


def _info(name: str, place: _Place, tensor: Tensor, records: Mapping[str, tuple[int, int]], path: Path) -> TensorInfo:
    where = f"{printable(str(path))}: tensor '{printable(name)}'"
    dtype = NAMES.get(place.storage.dtype)
    if dtype is None or tensor.layout != torch.strided or tensor.dtype != place.storage.dtype or tensor.shape != place.shape:
        raise AdapterError(f"{where} is not a plain tensor", hint="save it again as one")
    if not tensor.is_contiguous() or tensor.stride() != place.stride:
        raise AdapterError(f"{where} is a view that does not lie in order", hint="save it again after .contiguous()")
    start, length = records.get(place.storage.key, (0, -1))
    begin = place.offset * tensor.element_size()
    stop = begin + math.prod(place.shape) * tensor.element_size()
    if stop > length:
        raise AdapterError(f"{where} ends at byte {stop} of its storage, which has {max(length, 0)}", hint="the file is damaged")
    return TensorInfo(name, dtype, place.shape, start + begin, start + stop, path)


def _compare(header: Header, loaded: Mapping[str, Tensor], shown: str) -> None:
    """What lies at each place is what torch has loaded."""
    with TensorFile(header) as file:
        for name, info in header.tensors.items():
            if bytes_of(file.read(info)) != bytes_of(loaded[name].detach()):
                raise AdapterError(f"{shown}: tensor '{printable(name)}' is not where its pickle says", hint="the file is damaged")

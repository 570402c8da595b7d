"""Opening a base model in GGUF: one file, or all parts of a split one; weights in blocks that are known are decoded.

Names and the order of rows are llama.cpp's. What an adapter that was trained with transformers has in their place is for planning.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, OutputError, printable
from ..files.expression import Matrix
from ..files.gguf.ggml_types import GGML_TYPES
from ..files.gguf.gguf_header import GgufHeader, read_gguf_header
from ..files.safetensors.info import TensorInfo
from .checkpoint import Checkpoint, Shard
from .encodings.encoded import Encoded
from .encodings.gguf_blocks import LAYOUTS, gguf_encoded
from .locate import blob_sha256, resolve_entry

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""What ``gguf-split`` of llama.cpp calls the parts of a model, counted from 1."""


def open_gguf(path: Path) -> Checkpoint:
    """The model in the GGUF file at `path`, or in it and all other parts of the same one; only headers are read.

    Raises `CheckpointError` where a file is damaged, is no model, or a part is missing or of another model.
    """
    shards = tuple(_shard(name, path.parent) for name in _parts(path))
    headers = [_header(shard) for shard in shards]
    _check_model(headers[0])
    _check_parts(headers)
    stored: dict[str, TensorInfo] = {}
    for header in headers:
        if twice := next((name for name in header.tensors if name in stored), None):
            raise CheckpointError(
                f"{printable(str(header.path))}: the tensor '{printable(twice)}' is in {printable(stored[twice].path.name)} too"
            )
        stored |= header.tensors
    if not stored:
        raise CheckpointError(f"{printable(str(path))} holds no tensors")
    encoded: dict[str, Encoded] = {}
    for header in headers:
        for name, kind in header.kinds.items():
            if GGML_TYPES[kind].name in LAYOUTS:
                encoded[name] = gguf_encoded(stored[name], GGML_TYPES[kind].name)
    tensors: dict[str, Matrix] = {name: encoded[name].decoded if name in encoded else info for name, info in stored.items()}
    return Checkpoint(
        root=path.parent,
        shards=shards,
        tensors=tensors,
        config=None,
        index_metadata={},
        indexed=False,
        single_file=True,
        transposed=frozenset(),  # all are (out, in), whatever class has them
        encoded=encoded,
    )


def _shard(name: str, folder: Path) -> Shard:
    """The file `name` in `folder`."""
    real = resolve_entry(folder, name)
    return Shard(name, read_gguf_shard(folder / name), blob_sha256(real))


def read_gguf_shard(path: Path) -> GgufHeader:
    """The header of the file at `path`, as `as_shard` has it.

    Raises `CheckpointError` as `read_gguf_header` does.
    """
    return as_shard(read_gguf_header(path))


def as_shard(header: GgufHeader) -> GgufHeader:
    """`header` with the tensors in blocks that are known seen as rows of bytes."""
    return replace(header, tensors={name: _as_bytes(info, header) for name, info in header.tensors.items()})


def _as_bytes(info: TensorInfo, header: GgufHeader) -> TensorInfo:
    kind = GGML_TYPES[header.kinds[info.name]]
    if kind.name not in LAYOUTS:
        return info
    return replace(info, dtype="U8", shape=(*info.shape[:-1], info.shape[-1] // kind.numel * kind.nbytes))


def check_ending(out: Path, base: Checkpoint) -> None:
    """Raises `OutputError` where the path `out` is not one of what a merge into `base` writes: in GGUF a file, else a folder."""
    if base.gguf is not None and out.suffix != ".gguf":
        raise OutputError(
            f"{printable(str(out))} cannot be the output: a base in GGUF is merged into one file, whose name ends in .gguf",
            hint=f"give the path of a file, such as {printable(str(out.with_name(f'{out.name}.gguf')))}",
        )
    if base.gguf is None and out.suffix == ".gguf":
        raise OutputError(
            f"{printable(str(out))} cannot be the output: a base in safetensors is merged into a folder",
            hint="give the path of a folder; llama.cpp's convert_hf_to_gguf.py makes a GGUF file of that",
        )


def _header(shard: Shard) -> GgufHeader:
    if not isinstance(shard.header, GgufHeader):
        raise TypeError(f"{shard.path} is not in GGUF")
    return shard.header


def _parts(path: Path) -> list[str]:
    """The names of all files of the model that `path` is, or is a part of.

    Raises `CheckpointError` where one is missing.
    """
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path.name]
    count = int(found["count"])
    names = [f"{found['stem']}-{i:05d}-of-{found['count']}.gguf" for i in range(1, count + 1)]
    missing = [name for name in names if not os.path.lexists(path.parent / name)]
    if missing or path.name not in names:
        what = printable(missing[0]) if missing else f"a part of the number {int(found['number'])}"
        raise CheckpointError(
            f"{printable(str(path))} is one of {count} parts of a model, and {what} {'is missing' if missing else 'cannot be'}",
            hint="copy or download it again",
        )
    return names


def _check_model(header: GgufHeader) -> None:
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        hint = "the base model comes first, adapters after" if kind == "adapter" else None
        raise CheckpointError(f"{printable(str(header.path))} is not a model: its general.type is '{printable(kind)}'", hint=hint)


def _check_parts(headers: list[GgufHeader]) -> None:
    """The parts are, by what they say themselves, those of one model."""
    count = str(len(headers))
    for i, header in enumerate(headers):
        said = header.metadata.get("split.no"), header.metadata.get("split.count")
        if said == (str(i), count) or (count == "1" and said[1] in (None, "0")):
            continue
        words = "a model by itself" if said[1] is None else f"part {said[0]} of {said[1]}, counted from 0"
        raise CheckpointError(
            f"{printable(str(header.path))} says that it is {printable(words)}; by its name it is"
            f" {f'part {i} of {count}' if len(headers) > 1 else 'a whole model'}",
            hint="give the parts back the names that they were published with",
        )
    total, held = headers[0].metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if len(headers) > 1 and total not in (None, str(held)):
        raise CheckpointError(
            f"{printable(str(headers[0].path))} says that the model has {printable(str(total))} tensors; its parts hold {held}",
            hint="a part is of another model: copy or download them again",
        )

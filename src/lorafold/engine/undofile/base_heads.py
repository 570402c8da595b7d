"""What an undo file keeps of each of the base's files of weights beside its tensors: the header, and of GGUF the size.

Between tensors of GGUF are bytes of none, which are zeros: a base where they are not is not taken apart.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import NamedTuple

from ...checkpoints.checkpoint import Shard
from ...checkpoints.open_gguf import as_shard
from ...errors import CheckpointError, PlanError, printable
from ...files.gguf.gguf_header import MAGIC, GgufHeader, parse_gguf_header
from ...files.gguf.gguf_layout import gaps
from ...files.regular import open_regular
from ...files.safetensors.header import parse_header
from ...files.safetensors.info import TensorInfo
from ...files.safetensors.reader import TensorFile

_SIZE = struct.Struct("<Q")
_BLOCK = 1 << 20


class BaseHead(NamedTuple):
    """The first bytes of a file of the base, its tensors in the order of their bytes, its size, and the hash of its header."""

    raw: bytes
    tensors: tuple[TensorInfo, ...]
    file_size: int
    sha256: str


def check_padding(shard: Shard) -> None:
    """Raises `PlanError` where `shard` has bytes that are of no tensor, and not zeros."""
    header = shard.header
    if not isinstance(header, GgufHeader):
        return
    with TensorFile(header) as tensors:
        for start, stop in gaps(header):
            for first in range(start, stop, _BLOCK):
                found = bytearray(min(_BLOCK, stop - first))
                tensors.read_into(first, memoryview(found))
                if any(found):
                    raise PlanError(
                        f"{printable(str(shard.path))} has bytes that are of no tensor and not zeros, from {first} on: that cannot"
                        " be undone",
                        hint="nothing was written; merge without an undo file, and keep the base",
                    )


def kept_head(shard: Shard) -> bytes:
    """What the undo file keeps of `shard` beside its tensors. Raises `CheckpointError` where it cannot be read."""
    with open(open_regular(shard.path, error=CheckpointError)[0], "rb") as file:
        raw = file.read(shard.header.data_start)
    return _SIZE.pack(shard.header.file_size) + raw if isinstance(shard.header, GgufHeader) else raw


def head_from(kept: bytes, path: Path) -> BaseHead:
    """What `kept_head` kept of the file that will be at `path`.

    Raises `CheckpointError` where that is damaged.
    """
    if kept[_SIZE.size : _SIZE.size + len(MAGIC)] != MAGIC:
        infos = parse_header(kept, path)
        return BaseHead(kept, infos, infos[-1].stop if infos else len(kept), hashlib.sha256(kept).hexdigest())
    (file_size,), raw = _SIZE.unpack_from(kept), kept[_SIZE.size :]
    header = as_shard(parse_gguf_header(raw, path, file_size))
    if header.data_start != len(raw):
        raise CheckpointError(f"{printable(str(path))}: {len(raw)} bytes are not the header of a GGUF file")
    return BaseHead(raw, tuple(header.tensors.values()), file_size, header.sha256)

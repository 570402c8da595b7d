"""sha256 of every tensor of a checkpoint: in a receipt where it is asked for, so that damage can be told tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..checkpoints.checkpoint import Shard
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile

_BLOCK = 1 << 20


def tensor_hashes(
    shards: Sequence[Shard], *, threads: int | None = None, on_bytes: Callable[[int], None] | None = None
) -> dict[str, str]:
    """sha256 of the bytes of each tensor, by name, hexadecimal; `threads`: tensors that are read at once.

    Raises `CheckpointError` where one cannot be read.
    """
    found: dict[str, str] = {}
    with ThreadPoolExecutor(threads or os.cpu_count(), "hash") as pool:
        for shard in shards:
            with TensorFile(shard.header) as file:
                infos = list(shard.header.tensors.values())
                for info, sha256 in zip(infos, pool.map(lambda info, file=file: _sha256(file, info), infos), strict=True):
                    found[info.name] = sha256
                    if on_bytes is not None:
                        on_bytes(info.nbytes)
    return found


def _sha256(file: TensorFile, info: TensorInfo) -> str:
    digest, buffer = hashlib.sha256(), bytearray(min(_BLOCK, info.nbytes))
    for offset in range(0, info.nbytes, _BLOCK):
        view = memoryview(buffer)[: min(_BLOCK, info.nbytes - offset)]
        file.read_into(info.start + offset, view)
        digest.update(view)
    return digest.hexdigest()

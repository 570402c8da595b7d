"""Tensors in an adapter's file that are the base's own: PEFT saves an embedding whole when LoRA is put on it.

Such a copy says nothing. It must not count as a replacement, which could not be weighted or met by a second adapter.
"""

from __future__ import annotations

import torch

from ..adapters.adapter import Adapter
from ..adapters.reader import AdapterReader
from ..checkpoints.checkpoint import Checkpoint
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile

_BLOCK = 1 << 22
"""Elements compared at once."""


def is_copy(adapter: Adapter, info: TensorInfo, checkpoint: Checkpoint, base: TensorInfo) -> bool:
    """Whether the tensor `info` of `adapter` stands beside a LoRA pair and has, rounded to its dtype, the numbers of `base`.

    Of a model in memory none is taken for a copy: to put in the numbers that are there changes nothing.
    """
    if checkpoint.live or ".base_layer." not in info.name or info.shape != base.shape or base.torch_dtype is None:
        return False
    header = next(shard.header for shard in checkpoint.shards if base.name in shard.header.tensors)
    rows = info.shape[0]
    step = max(1, _BLOCK * rows // max(1, info.numel))
    with AdapterReader(adapter) as reader, TensorFile(header) as file:
        return all(
            torch.equal(
                reader.rows(info, start, count := min(step, rows - start)).to(base.torch_dtype), file.read_rows(base, start, count)
            )
            for start in range(0, rows, step)
        )

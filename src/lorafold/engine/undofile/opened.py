"""All tensors of a checkpoint, open for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...checkpoints.checkpoint import Checkpoint
from ...files.safetensors.info import TensorInfo
from ...files.safetensors.reader import TensorFile

Place = tuple[TensorFile, TensorInfo]
"""An open file and where in it a tensor lies."""


@contextmanager
def opened(checkpoint: Checkpoint) -> Iterator[dict[str, Place]]:
    """By name, the open file and the place of each tensor."""
    with ExitStack() as stack:
        found: dict[str, Place] = {}
        for shard in checkpoint.shards:
            file = stack.enter_context(TensorFile(shard.header))
            found |= {name: (file, info) for name, info in shard.header.tensors.items()}
        yield found

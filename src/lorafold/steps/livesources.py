"""What a plan for a model in memory reads from: the model's own tensors, and the adapters' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Self

from torch import Tensor

from ..adapters import Adapter, AdapterReader
from ..checkpoint import Checkpoint
from ..planning import MergePlan
from ..tensorfile import tensor_over
from .blocks import Block, block_bytes
from .buffers import Buffers
from .sources import Sources


class LiveSources(Sources):
    """As `Sources`, with `tensors` by name in the place of a base's files; they must not change before it is done with them."""

    def __init__(self, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(plan, checkpoint, adapters)
        self._tensors = tensors

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._readers = [stack.enter_context(AdapterReader(adapter)) for adapter in self.adapters]
            self._stack = stack.pop_all()
        return self

    def start(self, block: Block, buffers: Buffers) -> tuple[Tensor, bytearray]:
        """As `Sources.start`: a copy of the rows that `block` starts from, in the buffer beside it."""
        if block.step.replacement is not None:
            return super().start(block, buffers)
        tensor = self._tensors[str(block.step.source)].detach()
        name = self.checkpoint.tensors[str(block.step.source)].dtype
        buffer = buffers.take(block_bytes(block, name))
        rows = tensor_over(buffer, tensor.dtype, (block.count, block.columns))
        rows.copy_(tensor.reshape(-1)[block.offset : block.offset + block.numel].view(block.count, block.columns))
        return rows, buffer

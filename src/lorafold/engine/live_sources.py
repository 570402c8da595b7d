"""What a plan for a model in memory reads from: the model's own tensors, and the adapters' files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.reader import AdapterReader
from ..checkpoints.checkpoint import Checkpoint
from ..files.safetensors.buffers import tensor_over
from ..planning.plan import MergePlan, Step
from .blocks import Block, block_bytes
from .sources import Sources
from .threads import Buffers


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

    def rows(self, block: Block) -> None:
        """None: in no file."""

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

    def same_change(self, one: Step, other: Step) -> bool:
        """Whether both steps are known to do the same to a tensor: put in the same numbers, and add the same updates."""
        if one.action != other.action or one.rows != other.rows or (one.replacement is None) != (other.replacement is None):
            return False
        if one.replacement is not None and other.replacement is not None:
            readers = (self.replacement(step) for step in (one, other))
            if not torch.equal(*(reader.tensor(info) for reader, info in readers)):
                return False
        changes = [self.change(step) for step in (one, other)]
        if any(change.stages or change.first is not None for change in changes):  # DoRA, residuals: not compared, so not taken
            return False
        pieces = [[(piece.start, piece.stop, len(piece.updates)) for piece in change.pieces] for change in changes]
        updates = [[update for piece in change.pieces for update in piece.updates] for change in changes]
        return pieces[0] == pieces[1] and all(
            a.scaling == b.scaling and torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
            for a, b in zip(*updates, strict=True)
        )

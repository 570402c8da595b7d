"""What a plan for a model in memory reads from: the model's own tensors in the place of files."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ..files.safetensors.buffers import tensor_over
from ..files.safetensors.info import TensorInfo
from ..planning.plan import Step
from .elementproducts import same_elements
from .sources import Sources


class LiveTensors:
    """The `tensors` of a model by name, which must not change meanwhile; `infos`: what stands for them in its checkpoint."""

    def __init__(self, tensors: Mapping[str, Tensor], infos: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._infos = infos

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def file(self, info: TensorInfo) -> None:
        """None: in no file."""

    def read(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        """A copy of the tensor `info`, or of slices of one, on the CPU; in new memory or over the first bytes of `buffer`."""
        tensor = self._tensors[info.name].detach()
        first = (info.start - self._infos[info.name].start) // tensor.element_size()
        room = (
            torch.empty(info.shape, dtype=tensor.dtype, device="cpu")
            if buffer is None
            else tensor_over(buffer, tensor.dtype, info.shape)
        )
        return room.copy_(tensor.reshape(-1)[first : first + info.numel].view(info.shape))


def same_change(sources: Sources, one: Step, other: Step) -> bool:
    """Whether both steps of `sources` are known to do the same to a tensor: put in the same numbers, and add the same updates."""
    if one.action != other.action or one.rows != other.rows or (one.replacement is None) != (other.replacement is None):
        return False
    if one.replacement is not None and not torch.equal(sources.replacement(one), sources.replacement(other)):
        return False
    changes = [sources.change(step) for step in (one, other)]
    if not same_elements(changes[0].elements, changes[1].elements):
        return False
    if any(change.stages or change.first is not None or change.rotation is not None for change in changes):  # not compared
        return False
    pieces = [[(piece.start, piece.stop, len(piece.updates)) for piece in change.pieces] for change in changes]
    updates = [[update for piece in change.pieces for update in piece.updates] for change in changes]
    return pieces[0] == pieces[1] and all(
        a.scaling == b.scaling and torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B)
        for a, b in zip(*updates, strict=True)
    )

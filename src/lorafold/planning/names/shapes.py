"""The shapes of a base's weights under every name that adapters have for them, for readers that need them to read."""

from __future__ import annotations

from collections.abc import Mapping

from ...checkpoints.checkpoint import Checkpoint
from ...files.safetensors.info import TensorInfo
from .offers import Slot, offers_of


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `checkpoint` by its name, and of each weight that it offers under another.

    A stack of experts that are stored one by one is (E, out, in).
    """
    tensors = checkpoint.tensors
    offers = offers_of(tensors, checkpoint.config)
    shapes = {name: shape_of(slots, tensors) for name, slots in offers.slots.items()}
    for name, experts in offers.experts.items():
        if name not in shapes:
            shapes[name] = (len(experts), *shape_of(next(iter(experts.values())), tensors))
    return shapes | {name: info.shape for name, info in tensors.items()}


def shape_of(slots: tuple[Slot, ...], tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """The shape of the weight that is stored in `slots` of `tensors`, as it is stored."""
    stored = [tensors[slot.tensor].shape[0 if slot.index is None else 1 :] for slot in slots]
    if len(slots) == 1 and slots[0].outputs[0] == 0 and slots[0].outputs[1] == 1:
        return stored[0]
    rows = sum(int((slot.outputs[1] - slot.outputs[0]) * shape[0]) for slot, shape in zip(slots, stored, strict=True))
    return (rows, *stored[0][1:])

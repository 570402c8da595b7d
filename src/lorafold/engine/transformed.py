"""What OFT, BOFT, GLoRA or IA³ make of a weight: the adapter's tensors read, and the formula of the kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adapters.transform import Transform
from ..arithmetic import one_thread
from ..files.safetensors.info import TensorInfo
from ..kernel.rotations import RowRotation, boft, oft
from ..kernel.stages import Multiply, Stage
from ..kernel.update import LowRankUpdate

Read = Callable[[TensorInfo], Tensor]


def transforming_stages(shape: tuple[int, int], transform: Transform, read: Read, strength: float) -> tuple[Stage, ...]:
    """The stages by which GLoRA or IA³ make a new weight of one of `shape`, at the user's `strength`; none for other kinds.

    By the formulas of LyCORIS's layers (`lycoris/modules`: glora, ia3).
    """
    rows, columns = shape
    if transform.kind == "IA³":  # W ∘ (1 + strength · w), w of the outputs, or of the inputs, each of which has as many columns
        with one_thread():
            factors = 1 + strength * read(transform.parts["ia3"]).double().flatten()
            if transform.on_input:
                factors = factors.repeat_interleave(columns // factors.shape[0])
        return (Stage(LowRankUpdate(_zeros(1, columns), _zeros(rows, 1), 1.0), Multiply(factors, columns=transform.on_input)),)
    if transform.kind == "GLoRA":  # W + factor · W a1 a2 + factor · b1 b2
        a1, a2, b1, b2 = (read(transform.parts[name]).flatten(1) for name in ("a1", "a2", "b1", "b2"))
        factor = transform.factor * strength
        of_weight = LowRankUpdate(a2, _zeros(rows, a2.shape[0]), factor)
        return Stage(of_weight, inner=a1), Stage(LowRankUpdate(b2, b1, factor))
    return ()


def rotation_of(rows: int, transform: Transform, read: Read, strength: float) -> RowRotation | None:
    """What OFT or BOFT do to a weight of so many `rows`, at the user's `strength`; None for other kinds."""
    if transform.kind not in ("OFT", "BOFT"):
        return None
    parts = {name: read(info).double() for name, info in transform.parts.items()}
    rescale = parts["rescale"].flatten() if "rescale" in parts else None
    turn = oft if transform.kind == "OFT" else boft
    return turn(parts["oft_blocks"], transform.factor * rows, rescale, strength)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.float32, device="cpu").expand(shape)

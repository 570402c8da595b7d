"""The new weight that OFT, BOFT, GLoRA or IA³ make of one: the adapter's tensors read, and the formula of the kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..adapters.transform import Transform
from ..files.safetensors.info import TensorInfo
from ..kernel.rotations import butterflied, generalised, multiplied, rotated


def transformed(weight: Tensor, transform: Transform, read: Callable[[TensorInfo], Tensor], strength: float) -> Tensor:
    """(rows, columns) float64: what `transform` makes of `weight`, of the same shape, at the user's `strength`."""
    parts = {name: read(info).double() for name, info in transform.parts.items()}
    if transform.kind in ("OFT", "BOFT"):
        rescale = parts["rescale"].flatten() if "rescale" in parts else None
        turn = rotated if transform.kind == "OFT" else butterflied
        return turn(weight, parts["oft_blocks"], transform.factor * weight.shape[0], rescale, strength)
    if transform.kind == "IA³":
        return multiplied(weight, parts["ia3"].flatten(), strength, on_input=transform.on_input)
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return generalised(weight, a1, a2, b1, b2, transform.factor * strength)

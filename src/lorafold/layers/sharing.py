"""Weights that two modules share: merging into one would change the other.

A module knows its children, not its parents. So within `model.eval()`, which calls `train` of every module in turn, the model
is found on the call stack; everywhere else, the model is what is passed.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import Tensor, nn

from ..errors import LayerError


def sharers(weight: Tensor, owner: nn.Module, model: nn.Module) -> list[str]:
    """The parameters of other modules of `model` than `owner` that lie where `weight` lies, by name."""
    if weight.is_meta or weight.numel() == 0:
        return []
    place = (weight.device, weight.data_ptr())
    return [
        f"{module_name}.{name}".removeprefix(".")
        for module_name, module in model.named_modules()
        if module is not owner
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.device, parameter.data_ptr()) == place
    ]


def check_not_shared(owner: nn.Module, model: nn.Module) -> None:
    """Raises `LayerError` where another module of `model` than `owner` has its weight too, and merging would change both."""
    others = sharers(owner.weight, owner, model)  # type: ignore[arg-type]
    if others:
        own = next((name for name, module in model.named_modules() if module is owner), "")
        raise LayerError(
            f"the weight of {own or 'this layer'} is also {', '.join(others)}: merging into it would change both",
            hint="give the layer a weight of its own with lorafold.untie(model), or set merge_weights=False",
        )


def model_in_train() -> nn.Module | None:
    """The outermost module whose `train` or `eval` is being called; None outside of such a call."""
    outermost: nn.Module | None = None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.train.__code__:
            outermost = frame.f_locals["self"]
        frame = frame.f_back
    return outermost

"""Weights that two modules share: merging into one would change the other."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import LayerError


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

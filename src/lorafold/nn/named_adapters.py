"""Named adapters added to every LoRA layer of a model, and removed."""

from __future__ import annotations

from torch import nn

from ..errors import LayerError
from .foreign import own_layers
from .layers.mergeable import Mergeable


def add_adapter(model: nn.Module, name: str, *, r: int, lora_alpha: float | None = None, lora_dropout: float = 0.0) -> list[str]:
    """Add a fresh adapter `name` to every LoRA layer of `model`, and return the layers' names. `set_active` makes it count.

    - `r`, `lora_alpha` (by default r), `lora_dropout`: as for `attach`

    Raises `LayerError`, with the model as it was, where a layer has such an adapter already or takes none.

    >>> from lorafold.nn import attach
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> attach(model, "0", r=2), add_adapter(model, "style", r=1), model[0].adapter_names
    (['0'], ['0'], ['default', 'style'])
    """
    layers = own_layers(model, "add_adapter")
    added: list[Mergeable] = []
    try:
        for layer in layers.values():
            layer.add_adapter(name, r, r if lora_alpha is None else lora_alpha, lora_dropout)
            added.append(layer)
    except BaseException:
        for layer in added:
            layer.remove_adapter(name)
        raise
    return list(layers)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove the named adapter `name` from every LoRA layer of `model` that has it.

    Raises `LayerError`, with the model as it was, where it is active or no layer has it.
    """
    holders = [layer for layer in own_layers(model, "remove_adapter").values() if name in layer.lora_adapters]
    if not holders or any(name in layer.active_adapters for layer in holders):
        why = "is active" if holders else "is in no layer"
        raise LayerError(f"the adapter {name!r} {why}", hint="choose others with set_active first" if holders else None)
    for layer in holders:
        layer.remove_adapter(name)

"""LoRA layers taken out of a model again, and weights that modules share made separate."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import LayerError
from ..layers.sharing import sharers
from .attaching import put
from .merging import merge, model_lock, unmerge
from .replace import plain_module
from .walk import lora_layers


def detach(model: nn.Module, *, merge_first: bool = False) -> list[str]:
    """Put plain modules back in the place of LoRA layers, with the very same parameters, and return their names.

    The model is the base again, bit for bit. With `merge_first` the active adapters stay in the weights, for good. Adapters are
    gone; keep them with `save_adapter` or `lora_state_dict` before. Layers that were built as such, not by `attach`, become plain
    layers of torch; a `fan_in_fan_out` one has no plain kind and is refused.

    Raises `LayerError`, with the model as it was, where a base is not known or a layer has no plain kind, and what `merge` raises.

    >>> from lorafold.model import attach
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> attach(model, "0", r=2), detach(model), type(model[0])
    (['0'], ['0'], <class 'torch.nn.modules.linear.Linear'>)
    """
    with model_lock(model):
        layers = lora_layers(model)
        for name, layer in layers.items():
            if name == "":
                raise LayerError("the model is itself a LoRA layer, and cannot be replaced within itself")
            if getattr(layer, "fan_in_fan_out", False) and "_plain" not in layer.__dict__:
                raise LayerError(f"{name}: no plain layer of torch stores its weight as (in_features, out_features)")
        if merge_first:
            merge(model)
        else:
            unmerge(model)
        put(model, {layer: plain_module(layer) for layer in layers.values()})
        return list(layers)


def untie(model: nn.Module) -> list[str]:
    """Give every LoRA layer and every linear layer whose weight another module has too a weight of its own; returns their names.

    After it, merging into a tied output layer leaves the embedding alone. A transformers model is told by its configuration,
    ``tie_word_embeddings = False``, that both are to be saved and loaded.
    """
    lora = {layer.weight_owner for layer in lora_layers(model).values()}
    names = []
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or module in lora) and sharers(module.weight, module, model):
            weight: Tensor = module.weight
            module.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            names.append(name)
    config = getattr(model, "config", None)
    if names and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return names

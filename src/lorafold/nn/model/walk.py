"""The LoRA layers of a model, and the names that the plain model has for what they hold."""

from __future__ import annotations

from torch import nn

from ..layers.mergeable import Mergeable


def lora_layers(model: nn.Module) -> dict[str, Mergeable]:
    """The layers of `model` that can merge, by module name, in the model's order.

    >>> from lorafold.layers import Linear
    >>> list(lora_layers(nn.Sequential(nn.Linear(2, 2), Linear(2, 2, r=1))))
    ['1']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Mergeable)}


def plain_name(name: str) -> str:
    """`name` without what `torch.compile` puts into it.

    >>> plain_name("_orig_mod.layers.0._orig_mod.fc")
    'layers.0.fc'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")

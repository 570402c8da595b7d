"""loralib's two functions on models: which parameters train, and which are the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from ..errors import LayerError
from .foreign import check_no_others, no_layers
from .layers.lora_layer import BranchFactors, LoRALayer

Bias = Literal["none", "all", "lora_only"]


def mark_only_lora_as_trainable(model: nn.Module, bias: Bias = "none") -> None:
    """Freeze every parameter of `model` but those of its LoRA layers' adapters, and biases as told.

    `bias`: ``"none"``, ``"all"`` of the model, or ``"lora_only"``, those of LoRA layers. Raises `LayerError` for anything else,
    for a model without LoRA layers, and for one with those of another library, whose factors it would freeze.

    >>> from lorafold.nn.layers import Linear
    >>> layer = Linear(4, 4, r=2)
    >>> mark_only_lora_as_trainable(layer)
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['lora_A', 'lora_B']
    """
    _check_layers(model, "mark_only_lora_as_trainable")
    lora = {id(parameter) for _, parameter in lora_parameters(model)}
    biases = {id(parameter) for _, parameter in _biases(model, bias)}
    for parameter in model.parameters():
        if id(parameter) in biases:
            parameter.requires_grad = True
        elif id(parameter) not in lora:
            parameter.requires_grad = False


def lora_state_dict(model: nn.Module, bias: Bias = "none") -> dict[str, Tensor]:
    """The adapters' part of ``model.state_dict()``, with biases as told; `load_state_dict` takes it with ``strict=False``.

    `bias` is as for `mark_only_lora_as_trainable`.
    """
    _check_layers(model, "lora_state_dict")
    names = {name for name, _ in lora_parameters(model)} | {name for name, _ in _biases(model, bias)}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _check_layers(model: nn.Module, verb: str) -> None:
    """Raises `LayerError` where there is no LoRA layer, or one of another library, whose factors would be missed."""
    if not any(isinstance(module, LoRALayer) for module in model.modules()):
        raise no_layers(model, verb)
    check_no_others(model, verb)


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the adapters of `model`, with their names in its state dict."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer | BranchFactors) and isinstance(module, nn.Module):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("lora_"):
                    yield f"{prefix}.{name}".removeprefix("."), parameter


def _biases(model: nn.Module, bias: Bias) -> Iterator[tuple[str, nn.Parameter]]:
    if bias not in get_args(Bias):
        raise LayerError(f"bias must be one of {', '.join(map(repr, get_args(Bias)))}, not {bias!r}")
    own = {id(getattr(m, "bias", None)) for m in model.modules() if isinstance(m, LoRALayer)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_bias = name.rpartition(".")[2] == "bias" or name.endswith("_bias")
        if (bias == "all" and is_bias) or (bias == "lora_only" and id(parameter) in own):
            yield name, parameter

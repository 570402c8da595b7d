"""From a plain module to the LoRA layer that takes its place, and back; both have the very same parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..kernel.merge import Precision
from ..kernel.undo.keep import UndoKind
from .layers.around import execution_device, give_back, take_over
from .layers.conv import ConvLoRA
from .layers.embedding import Embedding
from .layers.linear import Linear
from .layers.mergeable import Mergeable

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Settings:
    """What the LoRA layers of one `attach` have in common; the fields are those of `lorafold.nn.layers.Linear`.

    `dtype` is that of lora_A and lora_B; None means float32 for weights of half precision, else the weight's.
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    merge_weights: bool = True
    undo: UndoKind = "copy"
    precision: Precision = "exact"
    dtype: torch.dtype | None = None


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: linear, its weight stored as (in_features, out_features)."""
    return bool(_kind(module).__name__ == "Conv1D") and _kind(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer, by its very type: a subclass may keep its weight in other ways."""
    return _kind(module) is nn.Linear or is_conv1d_of_gpt2(module)


def takes_bias(module: nn.Module) -> bool:
    """Whether `module` has no bias, and would add one if it had."""
    kind = _kind(module)
    return (kind is nn.Linear or kind in _CONVS) and "bias" in module._parameters and module._parameters["bias"] is None


def can_replace(module: nn.Module) -> bool:
    """Whether there is a LoRA layer for modules like `module`; whether its weight can be merged into says `check_plain`."""
    return is_linear(module) or _kind(module) in (nn.Embedding, *_CONVS)


def _kind(module: nn.Module) -> Any:
    """The type of `module`, or the one that it had before it was parametrized."""
    return type_before_parametrizations(module)


def lora_layer(module: nn.Module, settings: Settings) -> Mergeable:
    """A LoRA layer with the parameters of `module`, and factors that add nothing yet.

    Raises `LayerError` where the settings are not what a layer can have, or what others put around the module leaves no place
    for them.
    """
    layer = _empty_layer(module, settings)
    if isinstance(layer, ConvLoRA):
        layer.conv = module  # type: ignore[assignment]
    else:
        layer.weight = module.weight  # type: ignore[assignment]
        if getattr(module, "bias", None) is not None:
            layer.bias = module.bias
    layer.r, layer.lora_alpha = settings.r, settings.lora_alpha
    half = layer.weight.dtype in (torch.float16, torch.bfloat16)
    layer.create_factors(settings.dtype or (torch.float32 if half else None), execution_device(module))
    layer.reset_factors()
    layer.__dict__["_plain"] = module  # not a submodule: it is only put back
    take_over(layer, module)
    for part in (layer, layer.lora_dropout):
        part.training = module.training
    return layer


def stores_transposed(module: nn.Module) -> bool:
    """Whether the weight of `module` is (in_features, out_features): transformers' Conv1D, and layers with `fan_in_fan_out`.

    >>> stores_transposed(nn.Linear(2, 3))
    False
    """
    kinds = (kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))
    return any(kinds) or bool(getattr(module, "fan_in_fan_out", False))


def plain_module(layer: Mergeable) -> nn.Module:
    """The plain module that does what `layer` does without adapters, with the layer's parameters.

    It is the module that `attach` replaced, or for a layer that was built as such, one of torch's.
    """
    if isinstance(layer, ConvLoRA):
        give_back(layer, layer.conv)
        return layer.conv
    plain: nn.Module | None = layer.__dict__.get("_plain")
    if plain is None:
        plain = _empty_plain(layer)
    give_back(layer, plain)
    plain.weight = layer.weight
    if getattr(layer, "bias", None) is not None:
        plain.bias = layer.bias
    return plain.train(layer.training)


def _empty_layer(module: Any, settings: Settings) -> Mergeable:
    """The LoRA layer without memory for weights, and without factors."""
    common: dict[str, Any] = {
        "lora_alpha": settings.lora_alpha,
        "merge_weights": settings.merge_weights,
        "undo": settings.undo,
        "precision": settings.precision,
        "device": "meta",
    }
    if isinstance(module, nn.Embedding):
        options = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        common |= {option: getattr(module, option) for option in options}
        return Embedding(module.num_embeddings, module.embedding_dim, **common)
    common["lora_dropout"] = settings.lora_dropout
    if is_conv1d_of_gpt2(module):
        in_features, out_features = module.weight.shape
        return Linear(in_features, out_features, fan_in_fan_out=True, **common)
    if isinstance(module, nn.Linear):
        return Linear(module.in_features, module.out_features, bias=module.bias is not None, **common)
    return ConvLoRA(_kind(module), module.in_channels, module.out_channels, module.kernel_size, groups=module.groups, **common)


def _empty_plain(layer: Mergeable) -> nn.Module:
    if isinstance(layer, Embedding):
        return nn.Embedding(
            layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.max_norm, layer.norm_type,
            layer.scale_grad_by_freq, layer.sparse, device="meta",
        )  # fmt: skip
    out_features, in_features = layer.weight.shape
    return nn.Linear(in_features, out_features, layer.bias is not None, device="meta")

"""Merged weights for others, while the model's own are not touched."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..kernel.merge import Precision
from ..kernel.rounding import Stochastic
from .foreign import own_layers
from .layers.conv import ConvLoRA
from .layers.mergeable import Mergeable
from .layers.ownership import check_not_shared, places_of
from .layers.plain_weight import check_plain, offloaded
from .select import plain_name
from .training import lora_parameters


def iter_merged_layers(
    model: nn.Module,
    *,
    precision: Precision | None = None,
    noise: int | None = None,
    untouched: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """`iter_merged` of a model whose LoRA layers are ours; `noise`: the seed where it is at random. Raises as that does."""
    layers = own_layers(model, "iter_merged")
    places = places_of(model)
    for name, layer in layers.items():
        layer.check_finite(layer.active_adapters)
        if layer.adapter_names:
            if not layer.offloaded:
                check_plain(layer.weight_owner, name)
            check_not_shared(layer.weight_owner, model, places)
    return _merged_tensors(model, layers, precision, noise, untouched)


def _merged_tensors(
    model: nn.Module, layers: dict[str, Mergeable], precision: Precision | None, seed: int | None, untouched: bool
) -> Iterator[tuple[str, Tensor]]:
    adapters = {name for name, _ in lora_parameters(model)}
    weights = {_joined(name, layer.weight_name): layer for name, layer in layers.items()}
    renamed = {
        _joined(name, f"conv.{own}"): _joined(name, own)
        for name, layer in layers.items()
        if isinstance(layer, ConvLoRA)
        for own in ("weight", "bias")
    }
    modules = dict(model.named_modules())
    for key, tensor in model.state_dict().items():
        name = plain_name(renamed.get(key, key))
        layer = weights.get(key)
        if layer is not None and layer.active_adapters:
            noise = None if seed is None else Stochastic(seed, name)
            yield name, layer.merged_weight(precision=precision, noise=noise)
        elif untouched and key not in adapters:
            owner = modules.get(key.rpartition(".")[0])
            owner = owner.plain if isinstance(owner, Mergeable) else owner
            stored = offloaded(owner, key.rpartition(".")[2]) if tensor.is_meta and owner is not None else None
            yield name, tensor if stored is None else stored


def _joined(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor

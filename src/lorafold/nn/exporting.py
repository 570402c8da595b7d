"""Merged weights for others, while the model's own are not touched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from ..adapters.formats.peft.from_model import is_peft_model
from ..kernel.merge import Precision
from ..kernel.rounding import Stochastic
from .foreign import own_layers
from .layers.conv import ConvLoRA
from .layers.mergeable import Mergeable
from .layers.ownership import check_not_shared, places_of
from .layers.plain_weight import check_plain, offloaded
from .merging_layers import peft_merging
from .select import plain_name
from .training import lora_parameters


def iter_merged(
    model: nn.Module,
    *,
    precision: Precision | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    untouched: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (plain name, merged weight) of one LoRA layer after the other, each a new tensor, for an inference engine to take.

    The names are those of the model without LoRA layers. The model is not written to, and may be in training or merged. What is
    merged is always the base and the adapters as they are now, so nothing adds up over thousands of calls; the memory needed is
    that of one weight, as long as the receiver keeps none.

    - `precision`: by default each layer's own
    - `rounding`: ``"stochastic"`` keeps, on average, updates that are smaller than half a step of the weights' grid, which
      nearest loses (bfloat16, early in training); `seed` and the weight's name decide it, so take the step's number for a seed
    - `untouched`: whether to yield the other parameters and buffers too, as they are

    Of a model of PEFT: what its active adapters change, in the layers and of whole tensors, under the names of the model that PEFT
    was given, with the bits that merging into its files would give.

    Raises `NonFiniteError` and `LayerError` as `merge` does, before anything is yielded; for a model of PEFT
    what `merge_into` does.

    >>> from lorafold.nn.layers import Linear
    >>> model = nn.Sequential(nn.Linear(4, 4), Linear(4, 2, r=2))
    >>> [(name, weight.shape) for name, weight in iter_merged(model)]
    [('1.weight', torch.Size([2, 4]))]
    """
    if is_peft_model(model):
        options = {"precision": precision or "exact", "rounding": rounding, "seed": seed}
        return peft_merging().iter_planned(model, options, untouched=untouched)
    layers = own_layers(model, "iter_merged")
    places = places_of(model)
    for name, layer in layers.items():
        layer.check_finite(layer.active_adapters)
        if layer.adapter_names:
            if not layer.offloaded:
                check_plain(layer.weight_owner, name)
            check_not_shared(layer.weight_owner, model, places)
    return _merged_tensors(model, layers, precision, rounding, seed, untouched)


def merged_state_dict(model: nn.Module, *, precision: Precision | None = None) -> OrderedDict[str, Tensor]:
    """The state dict of the model without LoRA layers, adapters merged: plain names, no lora keys; it loads strictly.

    Merged weights are new tensors, everything else is shared with the model, as in `state_dict()`. The model is not written to.
    Raises as `iter_merged` does.
    """
    return OrderedDict(iter_merged(model, precision=precision, untouched=True))


def _merged_tensors(
    model: nn.Module, layers: dict[str, Mergeable], precision: Precision | None, rounding: str, seed: int, untouched: bool
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
            noise = Stochastic(seed, name) if rounding == "stochastic" else None
            yield name, layer.merged_weight(precision=precision, noise=noise)
        elif untouched and key not in adapters:
            owner = modules.get(key.rpartition(".")[0])
            owner = owner.plain if isinstance(owner, Mergeable) else owner
            stored = offloaded(owner, key.rpartition(".")[2]) if tensor.is_meta and owner is not None else None
            yield name, tensor if stored is None else stored


def _joined(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor

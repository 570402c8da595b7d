"""LoRA layers put in the place of a model's plain ones, and taken out again; weights that modules share made separate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import LayerError
from ..kernel.merge import Precision
from ..kernel.undo.keep import UndoKind
from .foreign import check_no_others, own_layers
from .layers.locks import model_lock
from .layers.mergeable import Mergeable
from .layers.ownership import check_not_shared, places_of, sharers
from .layers.plain_weight import check_plain
from .merging_layers import merge, unmerge
from .replace import Settings, lora_layer, plain_module
from .select import lora_layers, select


def attach(
    model: nn.Module,
    targets: str | Iterable[str],
    *,
    r: int,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    merge_weights: bool = True,
    undo: UndoKind = "copy",
    precision: Precision = "exact",
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Put LoRA layers in the place of the modules that `targets` mean, and return their names, in the model's order.

    - `targets`: names, ends of names, globs, or ``"all-linear"``; see `lorafold.nn.select`
    - `r`, `lora_alpha` (by default r, so that scaling is 1), `lora_dropout` (embeddings have none)
    - `merge_weights`: whether `eval()` merges
    - `undo`, `precision`: how merging is undone and how it rounds
    - `dtype`: of lora_A and lora_B, by default float32 for weights of half precision and else the weight's

    Parameters stay the very same objects, so optimizers and whoever else holds them go on. The weights under the new layers are
    frozen; `mark_only_lora_as_trainable` freezes the rest.

    Raises `LayerError`, with the model as it was, for a target that means nothing or cannot take an update, for settings that
    no layer can have, for a weight that another tensor of the model overlaps, that is no plain parameter (parametrized, pruned,
    quantised), and for a model that has adapter layers of another library. Hooks stay, and so does what replaced a `forward`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> weight = model[0].weight
    >>> attach(model, "all-linear", r=2, lora_alpha=4), model[0].weight is weight
    (['0', '2'], True)
    """
    settings = Settings(r, r if lora_alpha is None else lora_alpha, lora_dropout, merge_weights, undo, precision, dtype)
    if not isinstance(r, int) or r < 1:
        raise LayerError(f"r must be a positive integer, not {r!r}")
    names = select(model, targets)
    plain = [model.get_submodule(name) for name in names]
    check_no_others(model, "attach")
    places = places_of(model)
    for name, module in zip(names, plain, strict=True):
        check_plain(module, name, ("weight", "bias"), here=False)
        check_not_shared(module, model, places)
    layers = {module: lora_layer(module, settings) for module in plain}
    put(model, layers)
    return names


def put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in the place of its key, wherever in `model` that stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


def detach(model: nn.Module, *, merge_first: bool = False) -> list[str]:
    """Put plain modules back in the place of LoRA layers, with the very same parameters, and return their names.

    The model is the base again, bit for bit. With `merge_first` the active adapters stay in the weights, for good. Adapters are
    gone; keep them with `save_adapter` or `lora_state_dict` before. Layers that were built as such, not by `attach`, become plain
    layers of torch; a `fan_in_fan_out` one has no plain kind and is refused.

    Raises `LayerError`, with the model as it was, where a base is not known or a layer has no plain kind, and what `merge` raises.

    >>> from lorafold.nn import attach
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> attach(model, "0", r=2), detach(model), type(model[0])
    (['0'], ['0'], <class 'torch.nn.modules.linear.Linear'>)
    """
    with model_lock(model):
        layers = own_layers(model, "detach")
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

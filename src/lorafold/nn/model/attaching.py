"""LoRA layers put in the place of a model's plain ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ...errors import LayerError
from ...kernel.merge import Precision
from ...kernel.undo.keep import UndoKind
from ..layers.sharing import check_not_shared
from .replace import Settings, lora_layer
from .select import select


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

    - `targets`: names, ends of names, globs, or ``"all-linear"``; see `lorafold.model.select`
    - `r`, `lora_alpha` (by default r, so that scaling is 1), `lora_dropout` (embeddings have none)
    - `merge_weights`: whether `eval()` merges
    - `undo`, `precision`: how merging is undone and how it rounds
    - `dtype`: of lora_A and lora_B, by default float32 for weights of half precision and else the weight's

    Parameters stay the very same objects, so optimizers and whoever else holds them go on. The weights under the new layers are
    frozen; `mark_only_lora_as_trainable` freezes the rest.

    Raises `LayerError`, with the model as it was, for a target that means nothing or cannot take an update, for settings that
    no layer can have, and for a weight that another module has too.

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
    for module in plain:
        check_not_shared(module, model)
    layers = {module: lora_layer(module, settings) for module in plain}
    put(model, layers)
    return names


def put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value in the place of its key, wherever in `model` that stands."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]

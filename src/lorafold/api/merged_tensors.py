"""Merged weights of a model in memory, whose LoRA layers are ours or PEFT's: for a while in its place, or given to others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from ..adapters.formats.peft.from_model import is_peft_model
from ..errors import UpdateError
from ..kernel.merge import Precision
from ..nn.exporting import iter_merged_layers
from ..nn.merging_layers import merged_layers
from .live_merge import merge_own
from .planned import iter_planned


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Within it `model` is merged; after it, the layers that were not before are unmerged, whatever happened within.

    A model of PEFT is, within it, the plain model with its active adapters merged, and after it has its base's bits and its layers
    again; see `merge_into`.

    >>> from lorafold.nn.layers import Linear
    >>> model = nn.Sequential(Linear(4, 4, r=2))
    >>> with merged(model):
    ...     print(model[0].merged)
    True
    >>> model[0].merged
    False
    """
    with merge_own(model) if is_peft_model(model) else merged_layers(model):
        yield model


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

    Raises `NonFiniteError` and `LayerError` as `merge` does, before anything is yielded, and `UpdateError` for another `rounding`;
    for a model of PEFT what `merge_into` does.

    >>> from lorafold.nn.layers import Linear
    >>> model = nn.Sequential(nn.Linear(4, 4), Linear(4, 2, r=2))
    >>> [(name, weight.shape) for name, weight in iter_merged(model)]
    [('1.weight', torch.Size([2, 4]))]
    """
    if rounding not in ("nearest", "stochastic"):
        raise UpdateError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}")
    if is_peft_model(model):
        options = {"precision": precision or "exact", "rounding": rounding, "seed": seed}
        return iter_planned(model, options, untouched=untouched)
    return iter_merged_layers(model, precision=precision, noise=seed if rounding == "stochastic" else None, untouched=untouched)


def merged_state_dict(model: nn.Module, *, precision: Precision | None = None) -> OrderedDict[str, Tensor]:
    """The state dict of the model without LoRA layers, adapters merged: plain names, no lora keys; it loads strictly.

    Merged weights are new tensors, everything else is shared with the model, as in `state_dict()`. The model is not written to.
    Raises as `iter_merged` does.
    """
    return OrderedDict(iter_merged(model, precision=precision, untouched=True))

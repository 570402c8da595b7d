"""What a state dict says of merging, and what a layer does with one.

A merged layer's state dict holds the merged weight, as loralib's does; it is the export of a finished model. So that it is
not merged a second time where it is loaded, the dict's metadata, which `torch.save` keeps, says of each layer whether it was
merged. Where that is missing (safetensors files, dicts rebuilt by hand, loralib's files) and both readings are possible,
loading refuses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...errors import LayerError, printable

if TYPE_CHECKING:
    from .mergeable import Mergeable

State = Literal["nothing", "merge", "merged"]
"""What is to be done after the tensors of a layer were loaded: nothing, merge again, or take the weight as merged."""

_MERGED = "lora_merged"


def note(state_dict: Mapping[str, Any], prefix: str, *, merged: bool) -> None:
    """Write into the metadata of `state_dict`, where it has some, whether the layer at `prefix` is merged."""
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix.removesuffix("."), {})[_MERGED] = merged


def tag_state_dict(state_dict: Mapping[str, Any], *, merged: bool) -> OrderedDict[str, Any]:
    """`state_dict` with metadata that says of each LoRA layer in it whether its weight is merged; for dicts that lost theirs.

    >>> tagged = tag_state_dict({"fc.weight": 0, "fc.lora_A": 0, "fc.lora_B": 0}, merged=True)
    >>> tagged._metadata["fc"]
    {'lora_merged': True}
    """
    tagged = OrderedDict(state_dict)
    metadata = OrderedDict((name, dict(entry)) for name, entry in getattr(state_dict, "_metadata", {}).items())
    tagged._metadata = metadata  # type: ignore[attr-defined] # where torch keeps it
    for key in state_dict:
        layer, found, _ = key.partition("lora_adapters." if "lora_adapters." in key else "lora_A")
        if found:
            note(tagged, layer, merged=merged)
    return tagged


def prepare(layer: Mergeable, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> State:
    """Make `layer` ready to take its tensors from `state_dict`: unmerged, unless its weight is replaced and its base unknown.

    Returns what `finish` is to do. Raises `LayerError`, with the layer as it was, where it cannot be known what the tensors mean.
    """
    if not any(key.startswith(prefix) for key in state_dict):
        return "nothing"
    _rename(layer, state_dict, prefix)
    weight = state_dict.get(prefix + layer.weight_name)
    again = layer.merged
    if weight is None or layer._kept is not None:
        layer.unmerge()
    merged = metadata.get(_MERGED)
    if merged is None and weight is not None and _is_ambiguous(layer, state_dict, prefix, weight):
        if again:
            layer.merge()
        raise LayerError(
            f"{printable(prefix + layer.weight_name)}: the state dict holds this weight and an adapter for it, but does not say "
            "whether the adapter is merged into it already",
            hint="say it: model.load_state_dict(lorafold.nn.tag_state_dict(state_dict, merged=False)), or merged=True",
        )
    if layer.merged and weight is not None and weight.shape != layer.weight.shape:
        return "merged"  # it will not be loaded, and the base is still unknown
    layer.merged = False
    if merged and weight is not None:
        return "merged"
    return "merge" if again else "nothing"


def finish(layer: nn.Module, _: object) -> None:
    """The end of loading `layer`, when its submodules too have been loaded. A hook of `nn.Module.load_state_dict`."""
    state: State = layer._after_loading  # type: ignore[assignment]
    layer._after_loading = "nothing"  # type: ignore[assignment]
    if state == "merged":
        layer.merged = True  # type: ignore[assignment]
    elif state == "merge":
        layer.merge()  # type: ignore[operator]


def _rename(layer: Mergeable, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the weight and bias the names that the layer has for them, where `state_dict` has those of a plain layer."""
    inner = layer.weight_name.removesuffix("weight")
    if inner:
        for own in ("weight", "bias"):
            plain = state_dict.pop(prefix + own, None)
            if plain is not None:
                state_dict.setdefault(prefix + inner + own, plain)


def _is_ambiguous(layer: Mergeable, state_dict: Mapping[str, Any], prefix: str, weight: Tensor) -> bool:
    """Whether `weight` may be merged or not, and it matters."""
    firsts = [key for key in state_dict if key.startswith(prefix) and key.endswith("lora_A")]
    pairs = [(state_dict[key], state_dict.get(key[:-1] + "B")) for key in firsts]
    if all(lora_B is None or not bool(lora_A.any()) or not bool(lora_B.any()) for lora_A, lora_B in pairs):
        return False  # no update, so both are the same
    base = layer.weight
    comparable = not layer.merged and base.shape == weight.shape and base.dtype == weight.dtype and not base.is_meta
    return not (comparable and torch.equal(weight.to(base.device), base))  # unless it is the very base that is there

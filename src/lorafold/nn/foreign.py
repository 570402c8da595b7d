"""Whose adapter layers a model has, where they are not those of `lorafold.nn.layers`: PEFT's, LyCORIS's, another loralib's …

They are known by their classes, and no library is imported for it. A verb that finds none of its own layers says which it saw.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..adapters.formats.peft.from_model import is_peft_layer
from ..errors import LayerError
from .layers.lora_layer import BranchFactors, LoRALayer
from .layers.mergeable import Mergeable
from .select import lora_layers

_NAMES = {"peft": "PEFT", "lycoris": "LyCORIS", "loralib": "another loralib", "torchtune": "torchtune", "litgpt": "LitGPT"}

HINTS = {
    "PEFT": "merge_into, merged, iter_merged and merged_state_dict take PEFT's models; for all else use PEFT, or take its layers"
    " out with unload()",
    "LyCORIS": "merge them with LyCORIS, or take them out with restore(), and give the file to merge_into",
}


def own_layers(model: nn.Module, verb: str) -> dict[str, Mergeable]:
    """The LoRA layers of `model`, for `verb`.

    Raises `LayerError` where there are none, saying whose layers there are instead.
    """
    layers = lora_layers(model)
    if not layers:
        raise no_layers(model, verb)
    return layers


def no_layers(model: nn.Module, verb: str) -> LayerError:
    """The error of `verb` for a model without LoRA layers of lorafold."""
    found = others(model)
    if found:
        return LayerError(f"{verb}: the model has no LoRA layer of lorafold, but {_words(found)}", hint=_hint(found))
    return LayerError(f"{verb}: the model has no LoRA layer", hint="attach(model, …) or load_adapter_into(model, …) puts some in")


def check_no_others(model: nn.Module, verb: str) -> None:
    """Raises `LayerError` where `model` has adapter layers of another library, naming them."""
    found = others(model)
    if found:
        raise LayerError(f"{verb}: the model has {_words(found)}", hint=_hint(found))


def others(model: nn.Module) -> dict[str, list[str]]:
    """The modules of `model` that are adapter layers of other libraries, or run within such, by whose they are."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for each in _parts(module):
            owner = owner_of(each)
            if owner is not None:
                where = f"{name or 'the model'} ({type(each).__module__}.{type(each).__qualname__})"
                found.setdefault(owner, []).append(where)
    return found


def owner_of(module: nn.Module) -> str | None:
    """Whose adapter layer `module` is; None where it is none, or lorafold's."""
    if isinstance(module, LoRALayer | BranchFactors):
        return None
    if is_peft_layer(module):
        return "PEFT"
    for kind in type(module).__mro__:
        name = kind.__name__.lower()
        if kind.__module__.split(".")[0] == "torch":
            break
        if (
            "lycoris" in name
            or name == "loralayer"
            or (name.startswith("lora") and kind.__module__.split(".")[0] in ("torchtune", "litgpt"))
        ):
            return _owner(kind)
    if any(name.startswith("lora_") for name in module._parameters):
        return _owner(type(module))
    return None


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, and the one whose method has taken the place of its `forward`."""
    yield module
    around = getattr(module.__dict__.get("forward"), "__self__", None)
    if isinstance(around, nn.Module) and around is not module:
        yield around


def _owner(kind: type) -> str:
    root = kind.__module__.split(".")[0]
    return _NAMES.get(root, f"a library of its own, {root}")


def _words(found: dict[str, list[str]]) -> str:
    return " and ".join(
        f"{len(names)} layer{'s' if len(names) > 1 else ''} of {owner}: {names[0]}{' and others' if len(names) > 1 else ''}"
        for owner, names in found.items()
    )


def _hint(found: dict[str, list[str]]) -> str:
    return next((HINTS[owner] for owner in found if owner in HINTS), "use that library, or take its layers out first")

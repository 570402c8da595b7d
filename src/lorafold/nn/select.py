"""Which modules a list of targets means, and which LoRA layers a model has, by the names that the plain model has for them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import LayerError, nearest_names
from .layers.mergeable import Mergeable
from .replace import can_replace, is_linear


def lora_layers(model: nn.Module) -> dict[str, Mergeable]:
    """The layers of `model` that can merge, by module name, in the model's order.

    >>> from lorafold.nn.layers import Linear
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


ALL_LINEAR = "all-linear"


def select(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """The names of the modules of `model` that `targets` mean, in the model's order.

    A target is a module's full name, the end of one (``"q_proj"``, ``"mlp.up_proj"``), a glob of either
    (``"layers.[01].*_proj"``), or ``"all-linear"``: every linear layer but the one that gives the output logits.

    Raises `LayerError` for a target that means no module, or that names one that cannot take a low-rank update.

    >>> model = nn.ModuleDict({"up": nn.Linear(2, 4), "act": nn.ReLU(), "down": nn.Linear(4, 2)})
    >>> select(model, ["up"]), select(model, "all-linear")
    (['up'], ['up', 'down'])
    """
    modules = _candidates(model)
    wanted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else list(targets):
        wanted |= _all_linear(model, modules) if target == ALL_LINEAR else _meant(target, modules)
    if not wanted:
        raise LayerError("no targets were given", hint='name modules, or say "all-linear"')
    return [name for name in modules if name in wanted]


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` by name, without what lies inside LoRA layers, or computes a parametrized weight."""
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, Mergeable)]
    inside += [f"{name}.parametrizations" for name, module in model.named_modules() if is_parametrized(module)]
    return {name: m for name, m in model.named_modules() if name and not name.startswith(tuple(inside))}


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = {name for name, module in modules.items() if is_linear(module) and module is not output}
    if not found:
        raise LayerError('"all-linear" means no module: the model has no plain linear layer')
    return found


def _meant(target: str, modules: dict[str, nn.Module]) -> set[str]:
    is_glob = any(character in target for character in "*?[")
    if is_glob:
        named = {name for name in modules if fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")}
    else:
        named = {name for name in modules if name == target or name.endswith(f".{target}")}
    found = {name for name in named if can_replace(modules[name])}
    if not named:
        ends = {".".join(name.split(".")[-(target.count(".") + 1) :]) for name, m in modules.items() if can_replace(m)}
        near = nearest_names(target, ends)
        raise LayerError(f"no module is named {target!r}", hint=f"did you mean {near[0]!r}?" if near else None)
    refused = sorted(named - found)
    if refused and (not is_glob or not found):
        name, module = refused[0], modules[refused[0]]
        if isinstance(module, Mergeable):
            raise LayerError(f"{name} is a LoRA layer already", hint="give it another adapter with add_adapter")
        raise LayerError(
            f"{name} is a {type(module).__module__}.{type(module).__qualname__}, which cannot take a low-rank update",
            hint="Linear, Embedding, Conv1d, Conv2d and Conv3d of torch.nn and GPT-2's Conv1D can, their subclasses cannot",
        )
    return found

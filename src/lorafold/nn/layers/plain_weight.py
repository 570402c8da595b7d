"""Whether a module's weight is a plain parameter of its own, that can be written to and is then what the module computes with.

Weight norm, spectral norm, pruning and parametrizations compute it from other tensors whenever it is asked for; quantised ones hold
other numbers than they stand for; those that are offloaded are elsewhere. What is merged into any of these is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import LayerError

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_OFFLOADED = (
    "is offloaded by accelerate, and is loaded anew for each forward pass",
    "accelerate.hooks.remove_hook_from_submodules(model) brings it back; iter_merged takes it from where it is",
)


SHARDED_HINT = (
    "merge_weights=False evaluates without merging; to merge, save the adapter and merge it into the checkpoint's files"
    " (lorafold merge)"
)


def check_plain(module: nn.Module, where: str = "", names: tuple[str, ...] = ("weight",), *, here: bool = True) -> None:
    """Raises `LayerError` unless the tensors `names` of `module`, those that are there, are plain parameters of its own.

    - `where`: the module's name in its model, for the error
    - `here`: whether they must also not be kept elsewhere by accelerate
    """
    for name in names:
        found = why_not_plain(module, name)
        if found is not None and (here or found is not _OFFLOADED):
            why, hint = found
            raise LayerError(f"the {name} of {where or 'this layer'} {why}: what is merged into it would be lost", hint=hint)


def why_not_plain(module: nn.Module, name: str = "weight") -> tuple[str, str] | None:
    """What the tensor `name` of `module` is instead of a plain parameter, and the way round, in words; None where it is plain."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(each).__name__ for each in module.parametrizations[name])  # type: ignore[index]
        remove = f'torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")'
        return f"is computed by the parametrization {kinds}", f"make it a plain one with {remove}"
    if name not in module._parameters:
        return _computed(module, name)
    parameter: Any = module._parameters[name]
    if parameter is None:
        return None
    kind = type(parameter)
    if kind.__name__ == "DTensor":
        return "is a DTensor, of which this process holds a part", SHARDED_HINT
    if kind not in (nn.Parameter, Tensor, nn.Buffer):
        what = f"is a {kind.__module__}.{kind.__qualname__}, not a plain parameter"
        return what, "load the model in bfloat16, float16, float32 or float64"
    if parameter.dtype not in _FLOATS:
        return f"is of {parameter.dtype}, a quantised type", "load the model in bfloat16, float16, float32 or float64"
    if parameter.is_meta and offloaded(module, name) is not None:
        return _OFFLOADED
    return None


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """The numbers of the tensor `name` of `module` where accelerate keeps them between forward passes; None where it does not.

    accelerate's `AlignDevicesHook`, with `offload` set, has them in `weights_map` (accelerate, `hooks.py`).
    """
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        held = getattr(each, "weights_map", None)
        if getattr(each, "offload", False) and held is not None:
            found = held[name]
            return found if isinstance(found, Tensor) else None
    return None


def _computed(module: nn.Module, name: str) -> tuple[str, str] | None:
    """As `why_not_plain`, of a tensor that is no parameter."""
    if getattr(module, name, None) is None:
        return None
    held = {*module._parameters, *module._buffers}
    sources = sorted(each for each in held if each.startswith(f"{name}_"))
    if f"{name}_u" in held:
        remove = "remove_spectral_norm(module)"
    elif f"{name}_v" in held:
        remove = "remove_weight_norm(module)"
    elif f"{name}_mask" in held:
        remove = f'prune.remove(module, "{name}")'
    else:
        return "is no parameter of it", f"register it as one: module.{name} = torch.nn.Parameter(…)"
    return f"is computed from {', '.join(sources)}", f"make it a plain one with torch.nn.utils.{remove}"

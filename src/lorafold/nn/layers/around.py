"""What others have put around a plain module, its hooks and a `forward` of their own, kept for the LoRA layer in its place.

- hooks: the layer has the very same dictionaries, so a handle still removes its hook, and hooks that are added outlive the layer
- accelerate's `forward`, which moves weights and inputs: the layer runs its hook around its own sum
- any other `forward`: it is called with W + ΔW in the place of the weight, so that it does with the sum what it did with W
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import LayerError
from .adapted import Adapted
from .lora_layer import Branch
from .plain_weight import offloaded

_SHARED = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip
"""Where `nn.Module` keeps its hooks, by handle."""


def take_over(layer: Adapted, plain: nn.Module) -> None:
    """Make `layer`, which takes the place of `plain`, run what others have put around that.

    Raises `LayerError` for a `forward` of another's, where the layer has dropout: W + ΔW leaves no place for it.
    """
    of_a_part = any(plain is child for child in layer.children())  # whose state dict has the hooks of that already
    for name in _SHARED:
        if not (of_a_part and "state_dict" in name):
            layer.__dict__[name] = plain.__dict__[name]
    layer.__dict__["_is_full_backward_hook"] = plain.__dict__["_is_full_backward_hook"]
    if not of_a_part:
        layer._load_state_dict_post_hooks.update(plain._load_state_dict_post_hooks)
    if "forward" not in plain.__dict__:
        return
    if is_accelerated(plain):
        layer.__dict__["_hf_hook"], layer.__dict__["_old_forward"] = plain.__dict__["_hf_hook"], layer.forward
        layer.__dict__["forward"] = partial(_with_hook, layer)
        return
    if not isinstance(layer.lora_dropout, nn.Identity):
        raise LayerError(
            f"the forward of this {type(plain).__name__} was replaced by another's, and dropout cannot be put inside it",
            hint="attach with lora_dropout=0",
        )
    layer.__dict__["forward"] = partial(_with_sum, layer)


def give_back(layer: Adapted, plain: nn.Module) -> None:
    """Make `plain`, which takes the place of `layer` again, without accelerate's hook where it was removed from the layer."""
    if is_accelerated(plain) and plain is not layer and "_hf_hook" not in layer.__dict__:
        del plain.__dict__["_hf_hook"], plain.__dict__["_old_forward"], plain.__dict__["forward"]


def is_accelerated(module: nn.Module) -> bool:
    """Whether accelerate has put a hook around the `forward` of `module`."""
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate computes with the weight of `module`, which it keeps elsewhere; None where it does not."""
    if not is_accelerated(module) or offloaded(module, "weight") is None:
        return None
    hook: Any = module.__dict__["_hf_hook"]
    found = next((each.execution_device for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)), None)
    return torch.device("cpu" if found is None else found)


def _with_hook(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """What `layer` gives, within accelerate's hook of the plain module."""
    plain = layer.plain
    hook = plain._hf_hook
    if not layer.offloaded:
        _same_parameters(layer, plain)
    args, kwargs = hook.pre_forward(plain, *args, **kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    y = plain._old_forward(*args, **kwargs)
    branches = [_on(branch, y.device) for branch in layer.unmerged_branches()]
    return hook.post_forward(plain, layer.add_branches(y, x, branches))


def _with_sum(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """What the plain module's `forward` gives of W + ΔW, in W's dtype."""
    plain = layer.plain
    _same_parameters(layer, plain)
    weight: Tensor = layer.weight
    for branch in layer.unmerged_branches():
        weight = weight + layer.delta(branch)
    return torch.func.functional_call(_Forward(plain), {"inner.weight": weight.to(layer.weight.dtype)}, args, kwargs)


class _Forward(nn.Module):
    """A module's `forward` without its hooks, which the layer runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def _same_parameters(layer: Any, plain: nn.Module) -> None:
    """Give `plain` the parameters that the layer has now: they may have been replaced."""
    if layer.weight_owner is not plain:
        for name in ("weight", "bias"):
            if name in plain._parameters and name in layer._parameters:
                plain._parameters[name] = layer._parameters[name]


def _on(branch: Branch, device: torch.device) -> Branch:
    return branch._replace(lora_A=branch.lora_A.to(device), lora_B=branch.lora_B.to(device))

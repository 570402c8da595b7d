"""Whether a weight is its layer's own to write to: not shared with another module, not a part of one that processes share.

All layers of a model are looked at before `model.eval()` merges the first, so that what stops the last stops the first. `eval()`
reaches one layer after the other and tells none of them about the rest, and a module knows its children, not its parents. So the
model whose `eval()` a layer is reached by is found on the call stack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import Tensor, nn

from ...errors import LayerError, NonFiniteError
from .adapted import Adapted


def check_before_merging(layer: Adapted) -> None:
    """Check `layer`, or if it is the first to be merged of a model in `eval()`, all layers of the model that are to be merged.

    Raises `NonFiniteError` for an adapter that holds NaN or infinity, and `LayerError` for a weight that another module has too, or
    that is not this process's alone.
    """
    model = model_in_train() or layer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapted) and module.active_adapters}
    is_first = not any(other.merged for other in layers.values())
    for name, each in layers.items():
        if each is layer or (is_first and each.merge_weights):
            check_local(each, model)
            try:
                each.check_finite(each.active_adapters)
            except NonFiniteError as error:
                raise NonFiniteError(f"{name}: {error.message}" if name else error.message, hint=error.hint) from error
            check_not_shared(each.weight_owner, model)


def model_in_train() -> nn.Module | None:
    """The outermost module whose `train` or `eval` is being called; None outside of such a call."""
    outermost: nn.Module | None = None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.train.__code__:
            outermost = frame.f_locals["self"]
        frame = frame.f_back
    return outermost


def check_local(layer: nn.Module, model: nn.Module | None = None) -> None:
    """Raises `LayerError` where a parameter of `layer` is a DTensor, or FSDP holds it in `model`, the layer itself by default."""
    if _is_distributed(layer):
        raise LayerError("the weight is a DTensor, of which this process holds a part", hint=_HINT)
    for outer in _fsdp_modules(model or layer):
        if any(module is layer for module in outer.modules()):
            raise LayerError("the weight is sharded by FSDP: what is merged into it is lost when it is gathered anew", hint=_HINT)


_HINT = (
    "merge_weights=False evaluates without merging; to merge, save the adapter and merge it into the checkpoint's files"
    " (lorafold merge)"
)


def _is_distributed(layer: nn.Module) -> bool:
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    tensors: list[Tensor] = [*layer.parameters()]
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _fsdp_modules(model: nn.Module) -> Iterator[nn.Module]:
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed import fsdp

    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    yield from (module for module in model.modules() if isinstance(module, kinds))


def sharers(weight: Tensor, owner: nn.Module, model: nn.Module) -> list[str]:
    """The parameters of other modules of `model` than `owner` that lie where `weight` lies, by name."""
    if weight.is_meta or weight.numel() == 0:
        return []
    place = (weight.device, weight.data_ptr())
    return [
        f"{module_name}.{name}".removeprefix(".")
        for module_name, module in model.named_modules()
        if module is not owner
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter.device, parameter.data_ptr()) == place
    ]


def check_not_shared(owner: nn.Module, model: nn.Module) -> None:
    """Raises `LayerError` where another module of `model` than `owner` has its weight too, and merging would change both."""
    others = sharers(owner.weight, owner, model)  # type: ignore[arg-type]
    if others:
        own = next((name for name, module in model.named_modules() if module is owner), "")
        raise LayerError(
            f"the weight of {own or 'this layer'} is also {', '.join(others)}: merging into it would change both",
            hint="give the layer a weight of its own with lorafold.nn.untie(model), or set merge_weights=False",
        )

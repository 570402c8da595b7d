"""What is looked at before `model.eval()` merges anything: all layers of the model, so that what stops the last stops the first.

`eval()` reaches one layer after the other and tells none of them about the rest. A module knows its children, not its parents. So
the model whose `eval()` a layer is reached by is found on the call stack.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn

from ...errors import NonFiniteError
from .adapted import Adapted
from .sharded import check_local
from .sharing import check_not_shared


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

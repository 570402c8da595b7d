"""Whether a layer's weight is its own to write to, or a part, or a passing copy, of one that several processes hold.

What is merged into the whole weight that FSDP gathers for a forward pass is gone when it is gathered anew, and the layer would
still believe that it is merged. So such layers are refused, whether their weight is sharded at the moment or not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import Tensor, nn

from ...errors import LayerError


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

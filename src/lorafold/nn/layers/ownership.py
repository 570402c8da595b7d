"""Whether a weight is its layer's own to write to: not shared with another module, not a part of one that processes share.

All layers of a model are looked at before `model.eval()` merges the first, so that what stops the last stops the first. `eval()`
reaches one layer after the other and tells none of them about the rest, and a module knows its children, not its parents. So the
model whose `eval()` a layer is reached by is found on the call stack.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import FrameType

import torch
from torch import Tensor, nn

from ...errors import LayerError, NonFiniteError
from .adapted import Adapted
from .plain_weight import SHARDED_HINT, check_plain


def check_before_merging(layer: Adapted) -> None:
    """Check `layer`, or if it is the first to be merged of a model in `eval()`, all layers of the model that are to be merged.

    Raises `NonFiniteError` for an adapter that holds NaN or infinity, and `LayerError` for a weight that another module has too,
    that is not this process's alone, or that is no plain parameter.
    """
    model = model_in_train() or layer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapted) and module.active_adapters}
    is_first = not any(other.merged for other in layers.values())
    wanted = {n: each for n, each in layers.items() if each is layer or (is_first and each.merge_weights and not each.offloaded)}
    places, sharded = places_of(model), sharded_modules(model)
    for name, each in wanted.items():
        check_local(each, sharded)
        check_plain(each.weight_owner, name)
        try:
            each.check_finite(each.active_adapters)
        except NonFiniteError as error:
            raise NonFiniteError(f"{name}: {error.message}" if name else error.message, hint=error.hint) from error
        check_not_shared(each.weight_owner, model, places)


def model_in_train() -> nn.Module | None:
    """The outermost module whose `train` or `eval` is being called; None outside of such a call."""
    outermost: nn.Module | None = None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.train.__code__:
            outermost = frame.f_locals["self"]
        frame = frame.f_back
    return outermost


def check_local(layer: nn.Module, sharded: Collection[nn.Module] | None = None) -> None:
    """Raises `LayerError` where a parameter of `layer` is a DTensor, or where FSDP shards it.

    `sharded`: what `sharded_modules` finds in the model, by default in the layer alone.
    """
    if _is_distributed(layer):
        raise LayerError("the weight is a DTensor, of which this process holds a part", hint=SHARDED_HINT)
    if layer in (sharded_modules(layer) if sharded is None else sharded):
        raise _sharded_error()


def check_all_local(model: nn.Module) -> None:
    """Raises `LayerError` as `check_local` does, of any module of `model`."""
    check_local(model)
    if sharded_modules(model):
        raise _sharded_error()


def sharded_modules(model: nn.Module) -> frozenset[nn.Module]:
    """The modules of `model` whose weights FSDP shards: its own, and all that are in them."""
    return frozenset(module for outer in _fsdp_modules(model) for module in outer.modules())


def _sharded_error() -> LayerError:
    return LayerError("the weight is sharded by FSDP: what is merged into it is lost when it is gathered anew", hint=SHARDED_HINT)


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


Places = Mapping[tuple[torch.device, int], Sequence[tuple[nn.Module, str, Tensor]]]
"""The parameters and buffers of a model by the memory that they are views of, each with its module and its name in the model."""


def places_of(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> Places:
    """Where the tensors of `model` lie; `modules`: its modules by name, where they are not to be asked for again."""
    found: dict[tuple[torch.device, int], list[tuple[nn.Module, str, Tensor]]] = {}
    for module_name, module in model.named_modules() if modules is None else modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            place = None if tensor is None else storage_of(tensor)
            if tensor is not None and place is not None:
                found.setdefault(place, []).append((module, f"{module_name}.{name}".removeprefix("."), tensor))
    return found


def sharers(weight: Tensor, owner: nn.Module, model: nn.Module, places: Places | None = None) -> list[str]:
    """The parameters and buffers of `model` that have elements of `weight`, the weight of `owner`, by name; not itself.

    `places`: those of the model, where they are at hand.
    """
    place = storage_of(weight)
    if place is None:
        return []
    held = (places_of(model) if places is None else places).get(place, ())
    return [name for module, name, each in held if not (module is owner and each is weight) and overlap(each, weight)]


def check_not_shared(owner: nn.Module, model: nn.Module, places: Places | None = None) -> None:
    """Raises `LayerError` where another tensor of `model` has elements of the weight of `owner`, and merging would change both."""
    others = sharers(owner.weight, owner, model, places)  # type: ignore[arg-type]
    if others:
        own = next((name for name, module in model.named_modules() if module is owner), "")
        raise LayerError(
            f"the weight of {own or 'this layer'} is also {', '.join(others)}: merging into it would change both",
            hint="give the layer a weight of its own with lorafold.nn.untie(model), or set merge_weights=False",
        )


def storage_of(tensor: Tensor) -> tuple[torch.device, int] | None:
    """The device and address of the memory that `tensor` is a view of; None where it has none of its own to look at."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return None
    try:
        address = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # of subclasses that hold several tensors
        return None
    return (tensor.device, address) if address else None


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether some byte belongs to both.

    >>> whole = torch.zeros(4, 6)
    >>> overlap(whole, whole[3:]), overlap(whole[:2], whole[2:]), overlap(whole, whole.view(torch.int32))
    (True, False, True)
    >>> overlap(whole[:, :3], whole[:, 3:])
    False
    """
    place = storage_of(one)
    if place is None or place != storage_of(other):
        return False
    (low, high), (start, stop) = _extent(one), _extent(other)
    if max(low, start) >= min(high, stop):
        return False
    if _is_dense(one) and _is_dense(other):
        return True
    base = min(low, start)
    held = torch.zeros(max(high, stop) - base, dtype=torch.bool, device="cpu")  # one a byte, for the rare views with gaps
    _bytes(held, one, base).fill_(True)
    return bool(_bytes(held, other, base).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first to behind the last element, counted from the beginning of the storage."""
    start = int(tensor.storage_offset())
    last = start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()


def _is_dense(tensor: Tensor) -> bool:
    low, high = _extent(tensor)
    return high - low == tensor.numel() * tensor.element_size()


def _bytes(held: Tensor, tensor: Tensor, base: int) -> Tensor:
    """Of `held`, which has an element for each byte from `base` on, those that are `tensor`'s."""
    width = tensor.element_size()
    strides = [stride * width for stride in tensor.stride()]
    return held.as_strided((*tensor.shape, width), (*strides, 1), tensor.storage_offset() * width - base)

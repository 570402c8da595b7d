"""Whether two tensors have elements in common: not only where they begin at one place, but views of any offset, type and stride."""

from __future__ import annotations

import torch
from torch import Tensor


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

"""The addresses that compiled code is given: nothing else in the kernel takes the address of a tensor for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UpdateError


def is_memory(tensor: Tensor) -> bool:
    """Whether the elements of `tensor` lie in this process's memory as they are, which those of a subclass, a negated view, a
    sparse or quantised tensor, or one of another device need not."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_neg()
        and not tensor.is_conj()
        and not tensor.is_quantized
    )


def address(tensor: Tensor, dtype: torch.dtype, first: int = 0) -> int:
    """Where element `first` of `tensor`, counted along dimension 0, begins.

    - `dtype`: what the compiled code takes the elements for

    Raises `UpdateError` where that is not memory on the CPU with elements of `dtype`, within the tensor's storage.

    >>> tensor = torch.zeros(4, 3, dtype=torch.float32, device="cpu")
    >>> address(tensor, torch.float32, 2) - address(tensor, torch.float32)
    24
    """
    if not is_memory(tensor) or tensor.dtype != dtype:
        raise UpdateError(
            f"compiled code reads {dtype} in the CPU's memory; found {type(tensor).__name__} of {tensor.dtype} on {tensor.device}",
            hint="pass plain torch tensors; LORAFOLD_NATIVE=0 in the environment does without compiled code",
        )
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * dtype.itemsize
    begin = tensor.data_ptr()
    if end > tensor.untyped_storage().nbytes() or not begin or not 0 <= first <= tensor.shape[0]:
        raise UpdateError(
            f"a tensor of shape {tuple(tensor.shape)} reaches beyond its storage, or has none",
            hint="its storage was resized or freed; pass a copy: tensor.clone()",
        )
    return begin + first * tensor.stride(0) * dtype.itemsize

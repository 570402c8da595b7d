"""The memory of a tensor as bytes, to read into and to write from without a copy and without numpy."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...errors import UpdateError


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU `tensor`, sharing its memory: writable, one dimension; the view keeps the tensor alive.

    Raises `UpdateError` where the tensor is on another device, not contiguous, or reaches beyond its storage.

    >>> bytes(bytes_of(torch.tensor([1, 256], dtype=torch.int16)))
    b'\\x01\\x00\\x00\\x01'
    """
    begin = _address(tensor)
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(bytearray())
    memory = (ctypes.c_uint8 * nbytes).from_address(begin)
    memory.tensor = tensor  # type: ignore[attr-defined]  # an address alone keeps nothing alive
    return memoryview(memory).cast("B")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous CPU tensors have the same bytes: bit for bit, unlike `torch.equal`, and three times as fast.

    Raises `UpdateError` as `bytes_of` does.

    >>> same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    nbytes = one.numel() * one.element_size()
    if nbytes != other.numel() * other.element_size():
        return False
    return bool(_memcmp(_address(one), _address(other), nbytes) == 0)


def _address(tensor: Tensor) -> int:
    """Where the bytes of a contiguous CPU tensor begin, all of which are its storage's.

    Raises `UpdateError` where it is none.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise UpdateError(
            f"only a contiguous tensor on the CPU has bytes to share, not one on {tensor.device} of stride {tensor.stride()}"
        )
    if (tensor.storage_offset() + tensor.numel()) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UpdateError(f"a tensor of shape {tuple(tensor.shape)} reaches beyond its storage, which was resized or freed")
    return tensor.data_ptr()


_memcmp = ctypes.CDLL(None).memcmp  # the C library's; other threads go on meanwhile
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def tensor_over(buffer: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `dtype` and `shape` over the first bytes of `buffer`, sharing its memory."""
    count = 1
    for dim in shape:
        count *= dim
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)

"""What separates a base from a number that is computed again, packed: in compiled code where it can, and else in torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..cpu.loader import Build, Corrections, build
from ..cpu.pointers import address, is_memory
from .bits import INTEGERS, Packed, code_bytes, from_order, pack, to_order, unpack


def packed_difference(base: Tensor, guess: Tensor) -> tuple[Packed, bool]:
    """ord(base) − ord(guess), packed, and whether any of it is not zero; both of one shape and floating dtype.

    >>> packed, differs = packed_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 - 2**-22]))
    >>> unpack(packed).tolist(), differs
    ([0, 2], True)
    """
    used = _build_for(base, guess)
    if used is None:
        integers = to_order(base) - to_order(guess)
        return pack(integers), bool(integers.any())
    n, integer = base.numel(), INTEGERS[base.itemsize]
    codes = torch.empty(code_bytes(n), dtype=torch.uint8, device="cpu")
    near, far = (torch.empty(n, dtype=dtype, device="cpu") for dtype in (torch.int8, integer))
    job = Corrections(address(base, base.dtype), address(guess, guess.dtype), n, base.itemsize, codes.numel())
    job.codes, job.near, job.far = address(codes, torch.uint8), address(near, torch.int8), address(far, integer)
    used.library.lorafold_pack(ctypes.byref(job))
    return Packed(codes, near[: job.near_count].clone(), far[: job.far_count].clone(), n), bool(job.moved)


def apply(guess: Tensor, packed: Packed) -> Tensor:
    """The base that `packed_difference` was given with `guess`, which may be used up.

    Raises `ValueError` or `RuntimeError` where `packed` holds more or fewer numbers than its codes say.
    """
    used = _build_for(guess)
    if used is None:
        return from_order(to_order(guess) + unpack(packed).view(guess.shape), guess.dtype)
    integer = INTEGERS[guess.itemsize]
    if packed.n != guess.numel() or packed.codes.numel() != code_bytes(packed.n):
        raise ValueError(f"corrections of {packed.n} elements for {guess.numel()}")
    job = Corrections(None, address(guess, guess.dtype), packed.n, guess.itemsize, packed.codes.numel())
    job.codes, job.near, job.far = (
        address(part, dtype) for part, dtype in ((packed.codes, torch.uint8), (packed.near, torch.int8), (packed.far, integer))
    )
    job.near_count, job.far_count = packed.near.numel(), packed.far.numel()
    used.library.lorafold_apply(ctypes.byref(job))
    if (job.near_count, job.far_count) != (packed.near.numel(), packed.far.numel()):
        raise ValueError(f"{packed.near.numel()} and {packed.far.numel()} numbers, expected {job.near_count} and {job.far_count}")
    return guess


def _build_for(*matrices: Tensor) -> Build | None:
    """What does it for such tensors, or None."""
    fits = all(is_memory(each) and each.is_contiguous() and each.itemsize in INTEGERS for each in matrices)
    return build() if fits else None

"""The correction from a guess to a base, packed and applied by compiled code, as `undo.bits` does it with torch."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .loader import CorrectionJob, build
from .pointers import address, is_memory

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}
"""Its bits."""


class PackedParts(NamedTuple):
    """`Packed` in its parts, and the checksum of the base."""

    codes: Tensor
    near: Tensor
    far: Tensor
    checksum: int


def pack_native(base: Tensor, guess: Tensor, codes: Tensor) -> PackedParts | None:
    """What separates `base` from `guess`, where numbers that are not finite count as 0; None where that takes torch.

    - `base`, `guess`: of one shape and dtype; `codes`: room for them, uint8
    """
    used, width = build(), base.element_size()
    if used is None or not _whole(base, guess, codes):
        return None
    near = torch.empty(base.numel(), dtype=torch.int8, device="cpu")
    far = torch.empty(base.numel(), dtype=_INTEGERS[width], device="cpu")
    job = _job(base, guess, codes, near, far)
    getattr(used.library, f"lorafold_pack_{width}")(ctypes.byref(job))
    return PackedParts(codes, near[: job.near_count].clone(), far[: job.far_count].clone(), _sum(job))


def unpack_native(codes: Tensor, near: Tensor, far: Tensor, guess: Tensor, out: Tensor) -> int | None:
    """Fill `out`, which may be `guess`, with the base, and return its checksum; None, and nothing done, where that takes torch."""
    used = build()
    if used is None or not _whole(out, guess, codes):
        return None
    job = _job(out, guess, codes, near, far)
    getattr(used.library, f"lorafold_unpack_{out.element_size()}")(ctypes.byref(job))
    return _sum(job)


def _whole(base: Tensor, guess: Tensor, codes: Tensor) -> bool:
    return base.dtype in _INFINITY and all(is_memory(each) and each.is_contiguous() for each in (base, guess, codes))


def _job(base: Tensor, guess: Tensor, codes: Tensor, near: Tensor, far: Tensor) -> CorrectionJob:
    job = CorrectionJob(address(base, base.dtype), address(guess, base.dtype), base.numel(), codes.numel(), _INFINITY[base.dtype])
    job.codes = address(codes, torch.uint8)
    job.near = address(near, torch.int8) if near.numel() else None
    job.far = address(far, far.dtype) if far.numel() else None
    return job


def _sum(job: CorrectionJob) -> int:
    return int(job.by_column) << 64 ^ int(job.by_row)

"""Microscaling formats: E2M1, E2M3 or E4M3 numbers in blocks along a row, with scales of eight bits: MXFP4, MXFP6, MXFP8, NVFP4.

Those that begin with MX have a power of two for each 32 numbers; gpt-oss stores its experts so, transposed. NVFP4 has a number in
E4M3 for each 16 and one for the tensor, which multiplies in ModelOpt's files and divides in those of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...files.expression import Matrix, Permuted
from ...files.safetensors.info import TensorInfo
from .codebook import E2M1, E2M3, Constant, Valued
from .complaints import partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .packed import Unpacked
from .rewrite import encode_codes
from .scaled import BlockScaled

_EXPONENTS = ("U8", "F8_E8M0")


def find_microscaling(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights in MXFP4, MXFP6, MXFP8 and NVFP4. Raises `CheckpointError` where the scales do not fit them."""
    for name, info in stored.items():
        if name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) >= 3 and info.shape[-1] == 16:
            yield name.removesuffix("_blocks"), _gpt_oss(stored, info)
        elif info.dtype == "U8" and name.endswith("weight_packed"):
            yield name.removesuffix("_packed"), _compressed(stored, info)
        elif name.rpartition(".")[2] == "weight" and (scales := stored.get(f"{name}_scale")) is not None:
            if info.dtype == "U8" and (found := _modelopt(stored, info, scales)) is not None:
                yield name, found
            elif info.dtype == "F8_E4M3" and scales.dtype in _EXPONENTS:
                decoded = _scaled(info, scales, 32, _EXPONENTS)
                yield name, Encoded("MXFP8", (name, scales.name), decoded, 8, encode=encode_codes)


def _gpt_oss(stored: Stored, blocks: TensorInfo) -> Encoded:
    """Experts as gpt-oss stores them: (experts, out, in / 32, 16) bytes; the model has (experts, in, out)."""
    *outer, groups, each = blocks.shape
    scales = partner(stored, blocks, blocks.name.removesuffix("_blocks") + "_scales")
    rows = replace(blocks, shape=(*outer, groups * each))
    natural = _scaled(_e2m1(rows), scales, 32, _EXPONENTS)
    dims = (*range(len(outer) - 1), len(outer), len(outer) - 1)
    return Encoded("MXFP4", (blocks.name, scales.name), Permuted(natural, dims), 4, encode=encode_codes)


def _compressed(stored: Stored, codes: TensorInfo) -> Encoded:
    """compressed-tensors: NVFP4 where there is a global scale, by which it divides; MXFP6 where 32 numbers take 24 bytes; MXFP4."""
    scales = partner(stored, codes, codes.name.removesuffix("_packed") + "_scale")
    total = stored.get(codes.name.removesuffix("_packed") + "_global_scale")
    if total is None and len(codes.shape) > 1 and codes.shape[-1] % 24 == 0 and scales.shape[-1:] == (codes.shape[-1] // 24,):
        last = len(codes.shape) - 1
        six = Valued(Unpacked(codes, 6, last, codes.shape[-1] // 3 * 4), Constant(E2M3))
        return Encoded("MXFP6", (codes.name, scales.name), _scaled(six, scales, 32, _EXPONENTS), 6, encode=encode_codes)
    if total is None:
        decoded = _scaled(_e2m1(codes), scales, 32, _EXPONENTS)
        return Encoded("MXFP4", (codes.name, scales.name), decoded, 4, encode=encode_codes)
    return _nvfp4(codes, scales, total, divides=True)


def _modelopt(stored: Stored, codes: TensorInfo, scales: TensorInfo) -> Encoded | None:
    """ModelOpt: NVFP4 with ``weight_scale_2``, or MXFP4; None where it is neither."""
    total = stored.get(f"{codes.name}_scale_2")
    if total is not None:
        return _nvfp4(codes, scales, total, divides=False)
    if scales.dtype == "F8_E4M3":
        partner(stored, codes, f"{codes.name}_scale_2")
    if scales.dtype not in _EXPONENTS:
        return None
    return Encoded("MXFP4", (codes.name, scales.name), _scaled(_e2m1(codes), scales, 32, _EXPONENTS), 4, encode=encode_codes)


def _nvfp4(codes: TensorInfo, scales: TensorInfo, total: TensorInfo, *, divides: bool) -> Encoded:
    stack = codes.shape[:-2]
    require(total, ("F32",), (), (1,), stack, (*stack, 1), (*stack, 1, 1))
    inner = _scaled(_e2m1(codes), scales, 16, ("F8_E4M3",))
    ones = (1,) * len(codes.shape)
    if total.numel == 1:
        block, grid = inner.shape, replace(total, shape=ones)
    else:
        block, grid = (*ones[:-2], *inner.shape[-2:]), replace(total, shape=(*stack, 1, 1))
    decoded = BlockScaled(inner, grid, block, divides=divides)
    return Encoded("NVFP4", (codes.name, scales.name, total.name), decoded, 4, encode=encode_codes)


def _e2m1(codes: TensorInfo) -> Valued:
    """The numbers of bytes of which each holds two, the first in its low half."""
    if len(codes.shape) < 2:
        raise unfit(codes, "a matrix, or a stack of matrices", f"shape {list(codes.shape)}")
    last = len(codes.shape) - 1
    return Valued(Unpacked(codes, 4, last, codes.shape[last] * 2), Constant(E2M1))


def _scaled(codes: Matrix, scales: TensorInfo, each: int, dtypes: tuple[str, ...]) -> BlockScaled:
    """`codes`, each times the scale of its block of so many on the last axis."""
    *outer, columns = codes.shape
    grid = (*outer, -(-columns // each))
    require(scales, dtypes, grid)
    if scales.dtype == "U8":
        scales = replace(scales, dtype="F8_E8M0")  # the same bytes
    return BlockScaled(codes, scales, (*(1 for _ in outer), each))

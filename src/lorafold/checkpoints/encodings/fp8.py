"""Numbers in eight bits, E4M3, times a scale: of each block of 128 × 128, of the tensor, of each row or column.

The number is code · scale, though one name of the scale ends in "inv". Blocks at the ends are cut short, so that their size follows
from no grid: 192 rows and 2 scales are 128 + 64. It is stated in ``weight_block_size`` (transformers, DeepSeek, vLLM) or as the
``block_structure`` of compressed-tensors, and 128 × 128 where nothing is stated and that fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, printable
from ...files.expression import Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .encoded import Config, Encoded, Read, Stored
from .scaled import BlockScaled, as_double, blocks

_SCALES = ("weight_scale_inv", "weight_scale", "scale_inv", "scale", "qscale_weight")
"""What the scale of a module's ``weight`` is called after the module's name."""

_NUMBERS = ("F32", "BF16", "F16", "F64")
_USUAL = (128, 128)


def find_fp8(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights in E4M3 that have a scale beside them. Raises `CheckpointError` where that does not fit them, or `config`."""
    for name, codes in stored.items():
        if codes.dtype != "F8_E4M3":
            continue
        scales = _beside(name, stored)
        if scales is None:
            continue
        block, kind = _block(codes, scales, config)
        yield name, Encoded(f"FP8 with {kind}", (name, scales.name), _decoded(codes, scales, block), 8, encode=encode_fp8)


def _beside(name: str, stored: Stored) -> TensorInfo | None:
    """The scale of the tensor `name`; None where there is none, or one of another format."""
    module, _, last = name.rpartition(".")
    names = [f"{module}.{each}" if module else each for each in _SCALES] if last == "weight" else [f"{name}_scale_inv"]
    found = next((stored[each] for each in names if each in stored), None)
    if found is None or found.dtype in _NUMBERS or found.name.endswith("scale_inv"):
        return found
    return None  # the exponents of MXFP8


def _block(codes: TensorInfo, scales: TensorInfo, config: Config) -> tuple[tuple[int, ...], str]:
    """The size of a block along each dimension, and what it is in words.

    Raises `CheckpointError` where the scales are no such grid, or of a type that no scale has.
    """
    if scales.dtype not in (*_NUMBERS, "F8_E8M0", "U8"):
        raise _misfit(codes, scales, f"a scale of one of {', '.join(_NUMBERS)} or F8_E8M0", printable(scales.dtype))
    shape, grid = codes.shape, scales.shape
    if len(shape) < 2:
        raise _misfit(codes, scales, "a matrix, or a stack of matrices", f"codes of shape {list(shape)}")
    *stack, rows, columns = shape
    stated = stated_block(config)
    one = (1,) * len(stack)
    if stated is not None and grid == blocks(shape, (*one, *stated)):
        return (*one, *stated), f"a scale for each block of {stated[0]} × {stated[1]}"
    if scales.numel == 1:
        return shape, "one scale"
    whole = {(*stack, rows, 1): (*one, 1, columns), (*stack, 1, columns): (*one, rows, 1), (*stack, 1, 1): (*one, rows, columns)}
    whole |= {(*stack, rows): (*one, 1, columns)} | ({tuple(stack): (*one, rows, columns)} if stack else {})
    if stated is None and grid in whole:
        block = whole[grid]
        return block, "a scale for each row" if block[-2] == 1 else "a scale for each column" if block[-1] == 1 else "one scale"
    if stated is None and grid == blocks(shape, (*one, *_USUAL)):
        return (*one, *_USUAL), "a scale for each block of 128 × 128"
    if stated is None:
        expected = f"one scale, [{rows}, 1], or {list(blocks(shape, (*one, *_USUAL)))} for blocks of 128 × 128"
        raise _misfit(codes, scales, expected, f"{list(grid)}, and no block size is stated")
    expected = f"{list(blocks(shape, (*one, *stated)))} for the blocks of {stated[0]} × {stated[1]} that the configuration states"
    raise _misfit(codes, scales, expected, str(list(grid)))


def stated_block(config: Config) -> tuple[int, int] | None:
    """(rows, columns) of a block of weights, as a configuration states it; None where it states none.

    Raises `CheckpointError` where it is no such pair.
    """
    groups = config.get("config_groups")
    weights = [each.get("weights") for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
    structures = [each.get("block_structure") for each in weights if isinstance(each, Mapping) and each.get("strategy") == "block"]
    found: Any = config.get("weight_block_size") or next((each for each in structures if each), None)
    if isinstance(found, str):
        found = [int(part) if part.isdigit() else 0 for part in found.lower().split("x")]
    if found is None or found is False:
        return None
    if not isinstance(found, list | tuple) or len(found) != 2 or not all(type(each) is int and each > 0 for each in found):
        raise CheckpointError(f"the configuration states blocks of {found!r}, expected two positive integers")
    return found[0], found[1]


def _decoded(codes: TensorInfo, scales: TensorInfo, block: tuple[int, ...]) -> BlockScaled:
    """code · scale, with the scales in as many dimensions as the codes have."""
    if scales.dtype == "U8":
        scales = replace(scales, dtype="F8_E8M0")  # the same bytes
    grid = blocks(codes.shape, block)
    return BlockScaled(codes, Reshaped(scales, grid).settled() if scales.shape != grid else scales, block)


def _misfit(codes: TensorInfo, scales: TensorInfo, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(str(scales.path))}: tensor '{printable(scales.name)}' is to scale '{printable(codes.name)}'"
        f" {list(codes.shape)}, expected {expected}, found {found}",
        hint="configuration and weights are of different checkpoints, or damaged: copy or download them again",
    )


def encode_fp8(numbers: Tensor, rows: Matrix, read: Read, uniform: Tensor | None) -> Tensor:
    """The codes of `numbers` with the scales in `rows`, as `Encode` has it; beyond ±448 scales the code of ±448."""
    if not isinstance(rows, BlockScaled) or not isinstance(rows.codes, TensorInfo):
        raise TypeError(f"rows of FP8 are expected, found {type(rows).__name__}")
    old = read(rows.codes)
    scales = rows.scales_of(read)
    codes = e4m3_codes(numbers / scales, uniform)
    same = (numbers == rows.times(as_double(old), scales)) | numbers.isnan()
    same |= scales == 0
    return torch.where(same, old.view(torch.uint8), codes).view(torch.float8_e4m3fn)


_CHUNK = 1 << 15
"""Elements at once, whose intermediate numbers stay in the cache."""


def e4m3_codes(numbers: Tensor, uniform: Tensor | None) -> Tensor:
    """uint8: the code of one of the two neighbours of each of float64 `numbers`, as `Encode` has it; of NaN any.

    >>> e4m3_codes(torch.tensor([0.0, 1.0, 1.0625, -9.1, 1e9]).double(), None)
    tensor([  0,  56,  56, 209, 126], dtype=torch.uint8)
    """
    flat, codes = numbers.reshape(-1), torch.empty(numbers.numel(), dtype=torch.uint8, device="cpu")
    noise = None if uniform is None else uniform.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        some = flat[start : start + _CHUNK]
        size = some.abs().clamp_(max=448.0)
        power = (size.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp_(min=2.0**-6)
        steps = size.div_(power).mul_(8)  # exact: eight steps from a power of two to the next, and below the smallest one
        if noise is None:
            steps = steps.round_()  # ties to even, as the last bit of the code is the last of the number of steps
        else:
            low = steps.floor()
            steps = low.add_(steps.sub_(low) > noise[start : start + _CHUNK])
        exponent = (power.view(torch.int64) >> 52).sub_(1023 - 6)
        code = steps.nan_to_num_(0.0).to(torch.int64).add_(exponent.mul_(8))
        codes[start : start + _CHUNK] = code.bitwise_or_(some.signbit().to(torch.int64).mul_(128)).to(torch.uint8)
    return codes.view(numbers.shape)

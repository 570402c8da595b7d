"""Numbers of eight bits as ComfyUI, torchao and fbgemm store them: with a scale under another name, or without any scale.

ComfyUI keeps one scale, ``scale_weight``, or none at all; torchao flattens a weight into ``_weight_qdata`` and ``_weight_scale``;
Llama 4's experts by fbgemm are transposed, with a scale for each output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...errors import CheckpointError, printable
from ...files.expression import Matrix
from ...files.safetensors.info import TensorInfo
from .codebook import Constant
from .complaints import FLOATS, partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .rewrite import encode_codes
from .scaled import BlockScaled
from .zeropoint import BlockShifted

_EIGHT = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale", "_scale_inv", "scale", "scale_inv", "qscale_weight", "_scales")


def find_comfy(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """What is stored in FP8 and no format before has taken: with ComfyUI's ``scale_weight``, or for what its codes say.

    Raises `CheckpointError` where the configuration says that there are scales, and there are none.
    """
    marks = tuple(name for name, info in stored.items() if name.rpartition(".")[2] == "scaled_fp8")
    for name, codes in stored.items():
        if codes.dtype not in _EIGHT or name in marks:
            continue
        module, kind = name.removesuffix("weight"), codes.dtype.removeprefix("F8_")
        scale = stored.get(f"{module}scale_weight") if name.endswith("weight") else None
        if scale is not None:
            require(scale, FLOATS, (), (1,))
            aside = tuple(each for each in (f"{module}scale_input", *marks) if each in stored)
            one = replace(scale, shape=(1,) * len(codes.shape))
            decoded = BlockScaled(codes, one, codes.shape)
            yield name, Encoded(f"FP8 {kind} with one scale", (name, scale.name), decoded, 8, aside, encode_codes)
            continue
        if any(f"{name}{each}" in stored or f"{module}{each}" in stored for each in _SCALES):
            continue  # a scale that no format reads: what the codes stand for is not known
        if config.get("quant_method"):
            raise CheckpointError(
                f"{printable(str(codes.path))}: tensor '{printable(name)}' is of type {codes.dtype} and has no scale beside it,"
                f" expected one, as the configuration's quant_method {printable(str(config['quant_method']))[:40]} has it",
                hint="shards are missing, or of another checkpoint: copy or download them again",
            )
        decoded = BlockScaled(codes, Constant((1.0,), (1,) * len(codes.shape)), codes.shape)
        yield name, Encoded(f"FP8 {kind} without scales", (name,), decoded, 8, marks, encode_codes)


def find_fbgemm_experts(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """Experts in FP8, (experts, in, out), with a scale for each output beside them."""
    for name, codes in stored.items():
        scales = stored.get(f"{name}_scale")
        if codes.dtype == "F8_E4M3" and len(codes.shape) == 3 and scales is not None and not name.endswith("weight"):
            experts, rows, columns = codes.shape
            require(scales, FLOATS, (experts, 1, columns), (experts, columns, 1))
            decoded = BlockScaled(codes, replace(scales, shape=(experts, 1, columns)), (1, rows, 1))
            yield name, Encoded("FP8 with a scale for each column", (name, scales.name), decoded, 8, encode=encode_codes)


def find_torchao(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights of torchao in FP8, and in int8 or fewer bits that are stored in bytes.

    Raises `CheckpointError` for layouts of one kind of GPU, and where the scales are no grid of whole blocks.
    """
    for name, codes in stored.items():
        module, _, last = name.rpartition(".")
        if not (last.startswith("_") and last.endswith("_qdata")):
            continue
        prefix = f"{module}.{last.removesuffix('qdata')}" if module else last.removesuffix("qdata")
        weight = f"{module}.{last[1:-6]}" if module else last[1:-6]
        if f"{prefix}act_pre_scale" in stored:
            raise unfit(codes, "a weight that stands for itself", "factors for what goes into the layer, act_pre_scale")
        scales = require(partner(stored, codes, f"{prefix}scale"), FLOATS)
        zeros = stored.get(f"{prefix}zero_point")
        names = tuple(each.name for each in (codes, scales, zeros) if each is not None)
        require(codes, (*_EIGHT, "I8"))
        block = _whole_blocks(codes, scales)
        numbers: Matrix = codes
        if zeros is not None:
            numbers = BlockShifted(codes, replace(require(zeros, ("I8", "I32", "I64", *FLOATS)), shape=scales.shape), block)
            if zeros.numel != scales.numel:
                raise unfit(zeros, f"shape {list(scales.shape)}", f"shape {list(zeros.shape)}")
        grid = scales.shape or (1,) * len(codes.shape)
        label = "torchao int8" if codes.dtype == "I8" else "torchao FP8"
        yield weight, Encoded(label, names, BlockScaled(numbers, replace(scales, shape=grid), block), 8, encode=encode_codes)


def _whole_blocks(codes: TensorInfo, scales: TensorInfo) -> tuple[int, ...]:
    """The size of a block along each dimension, of which there are whole ones only."""
    if scales.numel == 1:
        return codes.shape
    grid = scales.shape
    if len(grid) != len(codes.shape) or any(not b or a % b for a, b in zip(codes.shape, grid, strict=True)):
        raise unfit(scales, f"one scale, or whole blocks of {list(codes.shape)}", f"shape {list(grid)}")
    return tuple(a // b for a, b in zip(codes.shape, grid, strict=True))

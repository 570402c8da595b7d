"""Weights quantised to each format that `quantised.py` measures, with torch alone: what a checkpoint stores for them.

Every quantiser takes the largest number of a block for its scale and rounds to the nearest code; GPTQ's words and those of Q4_K are
filled the same way, without calibration or a search for better scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """How a weight (name, matrix) is stored, what a configuration says of it, and ggml's name of one of GGUF's blocks."""

    name: str
    quantise: Callable[[str, Tensor], Stored]
    config: Mapping[str, Any]
    blocks: str = ""
    four_bits: bool = False


def fp8(name: str, weight: Tensor) -> Stored:
    """E4M3 in blocks of 128 × 128, the last of them cut short."""
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = whole.view(whole.shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None].clamp(min=1e-12)).reshape(whole.shape)[:rows, :columns]
    return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def int8(name: str, weight: Tensor) -> Stored:
    """A byte each, a scale for each row."""
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return {name: (weight.float() / scales).round().to(torch.int8), f"{name}_scale": scales}


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _dynamic_map() -> Tensor:
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found))


def nf4(name: str, weight: Tensor) -> Stored:
    """bitsandbytes' NF4 with double quantisation."""
    table, blocks, eight = torch.tensor(NF4), weight.float().reshape(-1, 64), _dynamic_map()
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / absmax[:, None], (table[:-1] + table[1:]) / 2).to(torch.uint8).view(-1, 2)
    offset = absmax.mean()
    rest = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    largest = rest.abs().amax(1)
    nested = torch.bucketize(rest / largest[:, None], (eight[:-1] + eight[1:]) / 2).to(torch.uint8).view(-1)[: absmax.numel()]
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape), "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": float(offset),
    }  # fmt: skip
    return {
        name: (codes[:, 0] << 4 | codes[:, 1])[:, None], f"{name}.absmax": nested, f"{name}.quant_map": table,
        f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": eight,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip


def mxfp4(name: str, weight: Tensor) -> Stored:
    """E2M1 in blocks of 32 with a power of two, as compressed-tensors stores it."""
    blocks = weight.float().view(weight.shape[0], -1, 32)
    powers = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = blocks / torch.exp2(powers)[..., None]
    codes = torch.bucketize(scaled.abs(), (sizes[:-1] + sizes[1:]) / 2).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    pairs = codes.view(weight.shape[0], -1, 2)
    return {f"{name}_packed": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scale": (powers + 127).to(torch.uint8)}


def int4(name: str, weight: Tensor) -> Stored:
    """Four bits with zero points in groups of 64 inputs, in GPTQ's words."""
    module, groups = name.removesuffix("weight"), weight.float().view(weight.shape[0], -1, 64)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1)
    return {
        f"{module}qweight": words(codes).T.contiguous(),
        f"{module}qzeros": words(zeros.T),
        f"{module}scales": scales.T.contiguous(),
        f"{module}g_idx": (torch.arange(weight.shape[1]) // 64).int(),
    }


def words(fields: Tensor) -> Tensor:
    """Eight fields of four bits along the rows in a word, the first in the lowest bits."""
    found: Tensor = (fields.long().reshape(fields.shape[0], -1, 8) << (4 * torch.arange(8))).sum(-1)
    return (found - (found >= 2**31) * 2**32).int()


def q8_0(name: str, weight: Tensor) -> Stored:
    """Blocks of 32: a float16 and a byte each."""
    blocks = weight.float().reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scales.float()).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return {name: torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], 1).view(weight.shape[0], -1)}


def q4_k(name: str, weight: Tensor) -> Stored:
    """Blocks of 256: two float16, scales and minima of six bits for each 32, four bits each; rows follow each other."""
    blocks = weight.float().reshape(-1, 8, 32)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1)
    scales, minima = (high - low) / 15, -low
    d, dmin = ((each.amax(1, keepdim=True) / 63).half() for each in (scales, minima))
    six = [(each / one.float()).round().clamp(0, 63).nan_to_num().to(torch.uint8) for each, one in ((scales, d), (minima, dmin))]
    scale, minimum = d.float() * six[0], dmin.float() * six[1]
    codes = ((blocks + minimum[..., None]) / scale[..., None]).round().nan_to_num().clamp(0, 15).to(torch.uint8)
    low_s, low_m = (each[:, :4] | each[:, 4:] >> 4 << 6 for each in six)
    rest = six[0][:, 4:] & 15 | (six[1][:, 4:] & 15) << 4
    pairs = codes.view(-1, 4, 2, 32)
    fours = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    return {name: torch.cat([d.view(torch.uint8), dmin.view(torch.uint8), low_s, low_m, rest, fours], 1)}


def compressed(num_bits: int, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": num_bits, "type": kind, "symmetric": True, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FORMATS = (
    Format("FP8, 128 × 128", fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    Format("INT8, rows", int8, compressed(8, "int", strategy="channel") | {"format": "int-quantized"}),
    Format("Q8_0", q8_0, {}, blocks="Q8_0"),
    Format("NF4, double", nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}, four_bits=True),
    Format("MXFP4", mxfp4, compressed(4, "float", strategy="group", group_size=32)
           | {"format": "mxfp4-pack-quantized"}, four_bits=True),
    Format("INT4, zeros, g 64", int4, {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2",
                                       "desc_act": False, "sym": False}, four_bits=True),
    Format("like Q4_K", q4_k, {}, blocks="Q4_K", four_bits=True),
)  # fmt: skip

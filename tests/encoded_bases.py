"""Two layers in each encoding, made without the vendors, adapters for them, and what they state as lorafold reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafold import LowRankUpdate
from lorafold.checkpoints.checkpoint import BaseReader, Checkpoint

OUT, IN = 64, 128
Made = tuple[dict[str, Tensor], dict[str, Any] | None]


def normal_codes(bits: int, shape: tuple[int, ...]) -> Tensor:
    """Unsigned codes of so many bits around their middle, so that few sums are out of range."""
    middle = 2 ** (bits - 1)
    return (torch.randn(shape) * middle / 3 + middle).round().clamp(0, 2**bits - 1).long()


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last axis in words of 32 bits, the first in the lowest bits."""
    each = 32 // bits
    words = (codes.unflatten(-1, (-1, each)) << (torch.arange(each) * bits)).sum(-1)
    return words.to(torch.int32) if int(words.max()) < 2**31 else (words - (words >= 2**31) * 2**32).to(torch.int32)


def text(value: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def small_floats(pairs: int) -> Tensor:
    """Bytes of two codes of E2M1 each, none of them at the end."""
    low, high = (torch.randint(0, 6, (OUT, pairs)) + 8 * torch.randint(0, 2, (OUT, pairs)) for _ in range(2))
    return (low + 16 * high).to(torch.uint8)


def nf4() -> Made:
    levels = torch.tensor([-1.0, -0.7, -0.52, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])
    codes = normal_codes(4, (OUT * IN // 2, 2))
    held = {"weight": (codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8), "weight.quant_map": levels}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]}
    held |= {"weight.absmax": torch.rand(OUT * IN // 64) + 0.5, "weight.quant_state.bitsandbytes__nf4": text(state)}
    return held, {"quant_method": "bitsandbytes", "load_in_4bit": True}


def int8() -> Made:
    held = {"weight": (normal_codes(8, (OUT, IN)) - 128).clamp(-127).to(torch.int8), "SCB": torch.rand(OUT) + 1}
    held["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return held, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def fp8() -> Made:
    held = {"weight": torch.randn(OUT, IN).to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(1, 1) + 0.1}
    return held, {"quant_method": "fp8", "weight_block_size": [128, 128]}


def mxfp8() -> Made:
    exponents = torch.randint(120, 128, (OUT, IN // 32), dtype=torch.uint8)
    return {"weight": torch.randn(OUT, IN).to(torch.float8_e4m3fn), "weight_scale": exponents}, {}


def nvfp4() -> Made:
    scales = (torch.rand(OUT, IN // 16) + 0.5).to(torch.float8_e4m3fn)
    held = {"weight": small_floats(IN // 2), "weight_scale": scales, "weight_scale_2": torch.tensor(0.1)}
    return held, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def nvfp4_compressed() -> Made:
    scales = (torch.rand(OUT, IN // 16) + 0.5).to(torch.float8_e4m3fn)
    held = {"weight_packed": small_floats(IN // 2), "weight_scale": scales, "weight_global_scale": torch.tensor([10.0])}
    return held, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}


def mxfp4_compressed() -> Made:
    held = {"weight_packed": small_floats(IN // 2), "weight_scale": torch.randint(120, 128, (OUT, IN // 32), dtype=torch.uint8)}
    return held, {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}


def mxfp6_compressed() -> Made:
    """Bytes of codes of E2M3, four in three of them, none of them near the end."""
    codes = torch.randint(0, 24, (OUT, IN // 4, 4)) + 32 * torch.randint(0, 2, (OUT, IN // 4, 4))
    words = (codes << torch.tensor([0, 6, 12, 18])).sum(-1)
    held = {"weight_packed": torch.stack([words >> shift & 255 for shift in (0, 8, 16)], -1).flatten(1).to(torch.uint8)}
    held["weight_scale"] = torch.randint(120, 128, (OUT, IN // 32), dtype=torch.uint8)
    return held, {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"}


def int4_compressed() -> Made:
    held = {"weight_packed": packed(normal_codes(4, (OUT, IN)), 4), "weight_scale": torch.rand(OUT, IN // 32) + 0.5}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    held["weight_shape"] = torch.tensor([OUT, IN])
    return held, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def int8_rows() -> Made:
    held = {"weight": (normal_codes(8, (OUT, IN)) - 128).to(torch.int8), "weight_scale": torch.rand(OUT, 1) + 0.5}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return held, {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}


def gptq() -> Made:
    """The codes transposed, eight rows of them in a word."""
    held = {"qweight": packed(normal_codes(4, (OUT, IN)), 4).T.contiguous(), "scales": (torch.rand(IN // 32, OUT) + 0.5).half()}
    held["qzeros"] = torch.full((IN // 32, OUT // 8), 0x77777777, dtype=torch.int32)
    held["g_idx"] = (torch.arange(IN) // 32).int()
    return held, {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "desc_act": False}


def awq() -> Made:
    held = {"qweight": packed(normal_codes(4, (IN, OUT)), 4), "scales": (torch.rand(IN // 32, OUT) + 0.5).half()}
    held["qzeros"] = packed(torch.full((IN // 32, OUT), 8), 4)
    return held, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def fp8_of_comfyui() -> Made:
    return {"weight": torch.randn(OUT, IN).to(torch.float8_e4m3fn), "scale_weight": torch.tensor(0.3)}, None


def fp8_alone() -> Made:
    return {"weight": torch.randn(OUT, IN).to(torch.float8_e4m3fn)}, None


KINDS: tuple[Callable[[], Made], ...] = (
    nf4, int8, fp8, mxfp8, nvfp4, nvfp4_compressed, mxfp4_compressed, mxfp6_compressed, int4_compressed, int8_rows,
    gptq, awq, fp8_of_comfyui,
    fp8_alone,
)  # fmt: skip
NAMES = [f"model.layers.{i}.q_proj.weight" for i in (0, 1)]


def made(folder: Path, kind: Callable[[], Made]) -> Path:
    """Two layers of `kind` with biases, and a norm."""
    folder.mkdir()
    torch.manual_seed(4)
    held, config = {"model.norm.weight": torch.ones(IN)}, None
    for name in NAMES:
        parts, config = kind()
        module = name.removesuffix("weight")
        held |= {f"{module}{part}": tensor for part, tensor in parts.items()} | {f"{module}bias": torch.randn(OUT)}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    stated = {} if config is None else {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | stated))
    return folder


def adapted(folder: Path, size: float) -> tuple[Path, dict[str, LowRankUpdate]]:
    folder.mkdir()
    torch.manual_seed(5)
    updates = {name: LowRankUpdate(torch.randn(4, IN), torch.randn(OUT, 4) * size, 1.0) for name in NAMES}
    held = {}
    for name, update in updates.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        held |= {f"{module}.lora_A.weight": update.lora_A, f"{module}.lora_B.weight": update.lora_B}
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, updates


def numbers(checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    with BaseReader(checkpoint) as reader:
        found = {name: checkpoint.tensors[name] for name in names}
        return {name: reader.rows(each, 0, each.shape[0]).view(each.shape).clone() for name, each in found.items()}

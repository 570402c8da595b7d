"""FP8 checkpoints made with numpy, and what they state and must merge to, computed without torch's arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold import LowRankUpdate
from models import edit_json, llama, save_adapter, save_base


def e4m3() -> np.ndarray:
    """(256,) float64: what each code of E4M3 states, by its bits: sign, four of exponent with bias 7, three of mantissa."""
    values = np.empty(256)
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[code] = np.nan if code & 0x7F == 0x7F else sign * size
    return values


E4M3 = e4m3()


def spread(scales: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """The scale of each number of a matrix, or of a stack of them, by loops over blocks."""
    full = np.empty(shape)
    for i in range(scales.shape[-2]):
        for j in range(scales.shape[-1]):
            rows, columns = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            full[..., rows, columns] = scales[..., i, j, None, None]
    return full


def quantised(weight: Tensor, block: tuple[int, int], peak: float = 400.0) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix or a stack, blocks at the ends cut short; the largest number of a block has a code of `peak`."""
    rows, columns = weight.shape[-2:]
    grid = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    scales = torch.empty(grid)
    for i in range(grid[-2]):
        for j in range(grid[-1]):
            part = weight[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scales[..., i, j] = part.abs().amax((-2, -1)).float() / peak
    full = torch.from_numpy(spread(scales.double().numpy(), tuple(weight.shape), block))
    return (weight.double() / full).float().to(torch.float8_e4m3fn), scales


def stated(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> np.ndarray:
    """The numbers of codes and scales, float64: one product of 4 and 24 bits, so exact."""
    return E4M3[codes.view(torch.uint8).numpy()] * spread(scales.double().numpy(), tuple(codes.shape), block)


def uniform(seed: int, tensor: str, count: int) -> np.ndarray:
    """(count,) float64: the random numbers of a tensor, SplitMix64 of a key and the element's index."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{tensor}".encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(41)) * np.uint64(2) + np.uint64(1)).astype(np.float64) * 2.0**-24


def wide(weight: np.ndarray, updates: list[LowRankUpdate]) -> np.ndarray:
    """W + Σ s · B A in float64, product after product."""
    total = weight.copy()
    for update in updates:
        B, A = update.lora_B.double().numpy() * update.scaling, update.lora_A.double().numpy()
        for k in range(A.shape[0]):
            total = total + B[:, k, None] * A[k]
    return total


def codes_of(sums: np.ndarray, scales: np.ndarray, old: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """(…) uint8: the codes of float64 `sums`, with the scale of each number; `old` stays where it states the sum already."""
    sizes = E4M3[:127]
    quotient = sums / scales
    size = np.minimum(np.abs(quotient), 448.0)
    low = np.minimum(np.searchsorted(sizes, size, side="right") - 1, 125)
    share = (size - sizes[low]) / (sizes[low + 1] - sizes[low])
    nearest = (share > 0.5) | ((share == 0.5) & (low % 2 == 1))
    up = nearest if noise is None else share > noise.reshape(share.shape)
    codes = (low + up).astype(np.uint8) | np.where(np.signbit(quotient), 0x80, 0).astype(np.uint8)
    return np.where(E4M3[old] * scales == sums, old, codes)


def to_fp8(base: Path, names: Mapping[str, tuple[int, int]], **config: object) -> dict[str, np.ndarray]:
    """Put FP8 in the place of the tensors `names` of the folder `base`, with blocks of the size beside each; what they state."""
    found: dict[str, np.ndarray] = {}
    index = base / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text()) if index.exists() else None
    for file in base.glob("*.safetensors"):
        held: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            held[name] = tensor
            if name in names:
                scale = f"{name.removesuffix('.weight')}.weight_scale_inv" if name.endswith(".weight") else f"{name}_scale_inv"
                held[name], held[scale] = quantised(tensor, names[name])
                found[name] = stated(held[name], held[scale], names[name])
                if weight_map is not None:
                    weight_map["weight_map"][scale] = file.name
        save_file(held, file, metadata={"format": "pt"})
    if weight_map is not None:
        index.write_text(json.dumps(weight_map))
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8", **config}}))
    return found


def whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of the files in `folder`."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def raw(tensor: Tensor) -> bytes:
    """Its bytes."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = (24, 16)  # ragged in every matrix of `llama`


def linear(layers: int = 2) -> dict[str, tuple[int, int]]:
    parts = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LINEAR}
    return {f"model.layers.{i}.{part}.{name}.weight": BLOCK for i in range(layers) for name, part in parts.items()}


def updates_in(adapter: Path) -> dict[str, list[LowRankUpdate]]:
    """What a plain adapter of PEFT adds, by the base tensor's name."""
    held, config = load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    modules = {name.split(".lora_A")[0] for name in held if ".lora_A" in name}
    return {
        f"{each.removeprefix('base_model.model.')}.weight": [
            LowRankUpdate(held[f"{each}.lora_A.weight"], held[f"{each}.lora_B.weight"], scaling)
        ]
        for each in modules
    }


class Fp8Llama:
    """A Llama in FP8 blocks with an adapter for some of its layers, and the numbers that its codes state."""

    def __init__(self, folder: Path, *, rows: bool = False, **config: Any) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        save_base(llama(), self.base)
        save_adapter(llama(), self.adapter, target_modules=["q_proj", "v_proj", "down_proj"], **config)
        edit_json(self.adapter / "adapter_config.json", base_model_name_or_path=None)
        self.numbers = to_fp8(self.base, linear(), weight_block_size=list(BLOCK), activation_scheme="dynamic")
        self.held = whole(self.base)

    def scale(self, name: str) -> np.ndarray:
        scales = self.held[f"{name}_scale_inv"].double().numpy()
        return spread(scales, tuple(self.held[name].shape), BLOCK)

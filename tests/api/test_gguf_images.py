"""Models of images in GGUF, as ComfyUI has them: their makers' names, and adapters in those and in diffusers'."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lorafold
from gguf_models import as_tensor, blocks, stated_by
from lorafold import LowRankUpdate
from oracle import correctly_rounded

SHAPES = {
    "img_in.weight": (64, 64),
    "double_blocks.0.img_attn.qkv.weight": (192, 64),
    "double_blocks.0.img_attn.proj.weight": (64, 64),
    "double_blocks.0.txt_attn.qkv.weight": (192, 64),
    "double_blocks.0.img_mlp.0.weight": (256, 64),
    "double_blocks.0.img_mod.lin.weight": (384, 64),
    "txt_in.weight": (64, 64),
    "time_in.in_layer.weight": (64, 64),
    "single_blocks.0.linear1.weight": (448, 64),
    "single_blocks.0.linear2.weight": (64, 320),
    "final_layer.adaLN_modulation.1.weight": (128, 64),
}  # fmt: skip


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_flux(tmp_path: Path, names: str) -> None:
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, shape in SHAPES.items():
        words = blocks(generator.normal(size=shape), "Q8_0", 0)
        writer.add_tensor(name, words, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = stated_by(tmp_path / "flux.gguf")
    held: dict[str, torch.Tensor] = {}
    updates: dict[str, list[tuple[slice, LowRankUpdate]]] = {}

    def add(stem: str, tensor: str, rows: slice = slice(None)) -> None:
        size = len(range(SHAPES[tensor][0])[rows])
        A, B = (torch.from_numpy(generator.normal(size=shape)).float() for shape in ((4, SHAPES[tensor][1]), (size, 4)))
        parts = ("lora_down", "lora_up") if names == "kohya" else ("lora_A", "lora_B")
        held[f"{stem}.{parts[0]}.weight"], held[f"{stem}.{parts[1]}.weight"] = A, B
        if names == "kohya":
            held[f"{stem}.alpha"] = torch.tensor(2.0)
        updates.setdefault(tensor, []).append((rows, LowRankUpdate(A, B, 0.5 if names == "kohya" else 1.0)))

    if names == "kohya":
        add("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn.qkv.weight")
        add("lora_unet_single_blocks_0_linear1", "single_blocks.0.linear1.weight")
    else:
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            add(f"transformer.transformer_blocks.0.attn.{part}", "double_blocks.0.img_attn.qkv.weight", slice(64 * i, 64 * i + 64))
        add("transformer.transformer_blocks.0.attn.to_out.0", "double_blocks.0.img_attn.proj.weight")
    save_file(held, tmp_path / "adapter.safetensors")
    lorafold.merge(tmp_path / "flux.gguf", [tmp_path / "adapter.safetensors"], tmp_path / "out.gguf", output_format="bf16")
    found = stated_by(tmp_path / "out.gguf")
    for name, weight in base.items():
        for rows, update in updates.get(name, [(slice(0), None)]):
            several = [] if update is None else [update]
            wanted = torch.from_numpy(correctly_rounded(as_tensor(weight[rows]), several, torch.bfloat16)).float().numpy()
            assert np.array_equal(found[name][rows], wanted), name
    assert lorafold.verify(tmp_path / "out.gguf", tmp_path / "flux.gguf", [tmp_path / "adapter.safetensors"]).ok

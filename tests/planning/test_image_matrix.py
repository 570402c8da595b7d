"""A part of `benchmarks/image_matrix.py`: one family, every layout of adapters and bases; and a checkpoint of all parts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from diffusion import added, as_diffusers, as_kohya, clip, sdxl, unet, write
from makers import CASES, converted, makers_of, open_clip
from models import different

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "image_matrix.py"
Named = dict[str, Tensor]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["image_matrix"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_pair_of_layouts_merges(tmp_path):
    matrix = script()
    found = list(matrix.cells("Lumina 2", tmp_path, ("net.",)))
    assert len(found) == len(matrix.ADAPTERS)
    assert [cell for cell in found if cell.outcome != "merged"] == []


def random_pairs(tensors: Named, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return {
        name.removesuffix(".weight"): (torch.randn(2, *t.shape[1:]) * 0.3, torch.randn(t.shape[0], 2, *(1,) * (t.dim() - 2)))
        for name, t in tensors.items()
        if name.endswith(".weight") and t.dim() > 1 and "embedding." not in name.replace("time_embedding.", "")
    }


def weights_of(model: torch.nn.Module) -> Named:
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items() if "position_ids" not in name}


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["SD 1.5", "SDXL"])
def test_a_checkpoint_of_all_parts(tmp_path, kind, spelling):
    """A1111's and ComfyUI's file: UNet, one or both text encoders and a VAE; each linear layer and convolution of all of them."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = (unet if kind == "SD 1.5" else sdxl)()
    main, text = weights_of(model), weights_of(clip())
    text = {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in text.items()}
    first = "cond_stage_model.transformer." if kind == "SD 1.5" else "conditioner.embedders.0.transformer."
    second = "conditioner.embedders.1.model."
    base = {f"model.diffusion_model.{name}": tensor for name, tensor in makers_of(kind, main).items()}
    base |= {first + name: tensor for name, tensor in text.items()}
    beside = {"first_stage_model.encoder.conv_in.weight": torch.ones(2, 2, 3, 3), "model_ema.decay": torch.tensor(0.5)}
    base |= beside
    big, stored = open_clip()
    if kind == "SDXL":
        base |= {second + name: tensor for name, tensor in stored.items()}
    updates = {"unet": random_pairs(main, 1), "text_encoder": random_pairs(text, 2)}
    if kind == "SDXL":
        updates["text_encoder_2"] = random_pairs(big, 3)
    parts = {"unet": "lora_unet", "text_encoder": "lora_te" if kind == "SD 1.5" else "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = as_kohya({parts[name]: u for name, u in updates.items()}, 2.0) if spelling == "kohya" else as_diffusers(updates)
    save_file({name: tensor.contiguous() for name, tensor in base.items()}, tmp_path / "base.safetensors")
    lorafold.merge(tmp_path / "base.safetensors", [write(tmp_path / "one.safetensors", tensors)], tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)

    def part(prefix: str) -> Named:
        return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}

    assert found.keys() == base.keys()
    assert (
        different(converted(CASES[kind], part("model.diffusion_model."), dict(model.config)), added(main, updates["unet"], 1.0))
        == {}
    )
    assert different(part(first), added(text, updates["text_encoder"], 1.0)) == {}
    assert different({name: found[name] for name in beside}, beside) == {}
    if kind == "SDXL":
        again = convert_open_clip_checkpoint(None, {second + name: tensor for name, tensor in part(second).items()}, second)
        assert different(again, added(big, updates["text_encoder_2"], 1.0)) == {}

"""A tiny diffusion pipeline with random weights, and one update written in every way that trainers have."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(r, in, *kernel) and (out, r, 1, …), as PEFT has them."""

UNET = ("attn1.to_q", "attn2.to_v", "attn1.to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv")
FLUX = ("attn.to_q", "attn.to_add_out", "ff.net.2", "proj_mlp", "norm1.linear", "context_embedder")
CLIP = ("q_proj", "fc1")


def quietly(make: Any) -> Any:
    """What `make` gives, without the warnings of libraries about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def unet(seed: int = 0) -> Any:
    """Convolutions 3 × 3 and 1 × 1, linear layers, attention; 0.1 million numbers."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return quietly(
        lambda: UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16, attention_head_dim=2,
        )
    )  # fmt: skip


def sdxl(seed: int = 0) -> Any:
    """A UNet with the blocks of SDXL's: 313 layers that an adapter may be for."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return quietly(
        lambda: UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
            attention_head_dim=2, transformer_layers_per_block=(1, 2, 2), addition_embed_type="text_time",
            addition_time_embed_dim=4, projection_class_embeddings_input_dim=24, use_linear_projection=True,
        )
    )  # fmt: skip


def flux(seed: int = 0) -> Any:
    """A double and a single block of FLUX."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    return quietly(
        lambda: FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )
    )  # fmt: skip


def clip(seed: int = 0) -> Any:
    """A text encoder of one layer."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, vocab_size=30, max_position_embeddings=8
    )
    return transformers.CLIPTextModel(config)


def pipeline(path: Path, *, main: str = "unet", second: bool = False) -> Path:
    """A pipeline's folder: `main`, one or two text encoders, a VAE, a scheduler and a tokenizer, and stray files beside them."""
    path.mkdir()
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "safety_checker": [None, None],
    }
    models = {main: unet() if main == "unet" else flux(), "text_encoder": clip()} | ({"text_encoder_2": clip(5)} if second else {})
    for name, model in models.items():
        quietly(lambda name=name, model=model: model.save_pretrained(path / name))
        index[name] = ["diffusers" if name == main else "transformers", type(model).__name__]
    (path / "vae").mkdir()
    save_file({"decoder.weight": torch.ones(3)}, path / "vae" / "diffusion_pytorch_model.safetensors")
    (path / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"the same again")
    for name, file in (("scheduler", "scheduler_config.json"), ("tokenizer", "vocab.json"), ("tokenizer", "merges.txt")):
        (path / name).mkdir(exist_ok=True)
        (path / name / file).write_text("{}")
    index |= {
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIM"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "LICENSE.md").write_text("free")
    (path / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    save_file({"all": torch.ones(2)}, path / "everything.safetensors")
    return path


def pairs(model: Any, ends: tuple[str, ...], *, r: int = 2, seed: int = 1) -> dict[str, Pair]:
    """Random factors for every linear and convolutional layer of `model` whose name ends in one of `ends`."""
    torch.manual_seed(seed)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(ends):
            out, inner, *kernel = module.weight.shape
            found[name] = (torch.randn(r, inner, *kernel) * 0.3, torch.randn(out, r, *(1 for _ in kernel)) * 0.3)
    return found


def as_kohya(parts: Mapping[str, Mapping[str, Pair]], alpha: float | None) -> dict[str, Tensor]:
    """By kohya's prefixes, as ``lora_unet``."""
    tensors = {}
    for prefix, factors in parts.items():
        for name, (A, B) in factors.items():
            spelled = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{spelled}.lora_down.weight": A, f"{spelled}.lora_up.weight": B}
            if alpha is not None:
                tensors[f"{spelled}.alpha"] = torch.tensor(alpha)
    return tensors


def as_diffusers(parts: Mapping[str, Mapping[str, Pair]]) -> dict[str, Tensor]:
    """By folders, with PEFT's endings."""
    tensors = {}
    for folder, factors in parts.items():
        for name, (A, B) in factors.items():
            tensors |= {f"{folder}.{name}.lora_A.weight": A, f"{folder}.{name}.lora_B.weight": B}
    return tensors


def metadata(folders: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The file's metadata with the fields of each component's LoraConfig."""
    flat = {f"{folder}.{field}": value for folder, fields in folders.items() for field, value in fields.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}


def write(path: Path, tensors: Mapping[str, Tensor], remarks: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(remarks or {}))
    return path


def added(base: Mapping[str, Tensor], factors: Mapping[str, Pair], scaling: float) -> dict[str, Tensor]:
    """The weights with the update in, summed in float64 and rounded once."""
    merged = dict(base)
    for name, (A, B) in factors.items():
        weight = base[f"{name}.weight"]
        delta = scaling * (B.double().flatten(1) @ A.double().flatten(1))
        merged[f"{name}.weight"] = (weight.double() + delta.view(weight.shape)).to(weight.dtype)
    return merged


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of one component."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def update(seed: int = 1) -> dict[str, dict[str, Any]]:
    """Factors for the UNet and the first text encoder of `pipeline`."""
    return {
        "lora_unet": pairs(unet(), UNET, seed=seed),
        "lora_te1": {f"text_model.{n}": f for n, f in pairs(clip(), CLIP, seed=seed + 1).items()},
    }


def kohya(path: Path, seed: int = 1) -> Path:
    """A file of these, as kohya names them."""
    return write(path, as_kohya(update(seed), alpha=3.0))


def files(folder: Path) -> dict[str, bytes]:
    """All files below `folder`, by their path in it."""
    return {
        str(Path(place, name).relative_to(folder)): Path(place, name).read_bytes()
        for place, _, names in os.walk(folder)
        for name in names
    }

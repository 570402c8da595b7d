"""The prefixes and endings of adapters for image and video models: each leads to the tensors that the plainest one leads to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from diffusion import CLIP, FLUX, added, as_diffusers, as_kohya, clip, flux, pairs, write
from lorafold import ReadOptions
from lorafold.errors import AdapterError
from makers import makers_of
from models import different, refused

Pair = tuple[Tensor, Tensor]
DOTTED = ("diffusion_model", "model.diffusion_model", "transformer", "unet", "transformer.base_model.model", "pipe.dit",
          "conditional_transformer")  # fmt: skip
UNDERSCORED = ("lora_unet", "lora_unet_", "lora_transformer", "Hunyuan_video_I2V_lora", "lycoris")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """FLUX in a lone file, in diffusers' names and in its makers'."""
    path = tmp_path_factory.mktemp("bases")
    held = {name: tensor.clone().contiguous() for name, tensor in flux().state_dict().items()}
    found = {}
    for name, tensors in (("diffusers", held), ("makers", makers_of("FLUX.1", held))):
        save_file(tensors, path / f"{name}.safetensors")
        found[name] = (path / f"{name}.safetensors", tensors)
    return found


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    lorafold.merge(base, [adapter], out, overwrite=True, read_options=ReadOptions(**options))
    (file,) = out.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("prefix", [*DOTTED, *UNDERSCORED])
def test_what_modules_of_the_main_model_are_called_after(tmp_path, bases, prefix):
    factors = pairs(flux(), FLUX)
    tensors = as_kohya({prefix: factors}, alpha=2.0) if prefix in UNDERSCORED else as_diffusers({prefix: factors})
    adapter = write(tmp_path / "one.safetensors", tensors)
    plain = write(tmp_path / "plain.safetensors", as_diffusers({"transformer": factors}))
    base, held = bases["diffusers"]
    assert different(merged(base, adapter, tmp_path / "out"), added(held, factors, 1.0)) == {}
    wanted = merged(bases["makers"][0], plain, tmp_path / "wanted")
    assert different(merged(bases["makers"][0], adapter, tmp_path / "out"), wanted) == {}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_that_do_not_say_what_they_are_of(tmp_path, bases, prefix):
    """A lone file of PEFT's lacks its alpha, one of an image model has none: the error says how to say which it is."""
    factors = pairs(flux(), FLUX)
    tensors = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{prefix}{name}.lora_A.weight": A, f"{prefix}{name}.lora_B.weight": B}
    adapter = write(tmp_path / "one.safetensors", tensors)
    base, held = bases["diffusers"]
    refused(base, [adapter], AdapterError, "in no format", "ReadOptions(format='diffusers')")
    assert different(merged(base, adapter, tmp_path / "out", format="diffusers"), added(held, factors, 1.0)) == {}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_pairs_without_weight_in_their_names(tmp_path, bases, prefix):
    """Mochi's: loralib's endings, so that they are asked for; the factor is 1."""
    factors = pairs(flux(), FLUX)
    tensors = {
        f"{prefix}{name}.{part}": t for name, each in factors.items() for part, t in zip(("lora_A", "lora_B"), each, strict=True)
    }
    adapter = write(tmp_path / "one.safetensors", tensors)
    base, held = bases["diffusers"]
    refused(base, [adapter], AdapterError, "lora_alpha", "ReadOptions(format='diffusers')")
    assert different(merged(base, adapter, tmp_path / "out", format="diffusers"), added(held, factors, 1.0)) == {}


@pytest.mark.parametrize(
    ("part", "place", "body"),
    [
        ("text_encoders.clip_l.transformer", "text_encoders.clip_l.transformer.", "text_model."),
        ("text_encoders.clip_g.transformer", "text_encoders.clip_g.transformer.", "text_model."),
        ("text_encoders.t5xxl.transformer", "text_encoders.t5xxl.transformer.", ""),
        ("text_encoders.qwen3_06b.transformer", "text_encoders.qwen3_06b.transformer.", "model."),
        ("text_encoders.clip_l.transformer", "cond_stage_model.transformer.", "text_model."),
    ],
)
def test_text_encoders_as_comfyui_calls_them(tmp_path, part, place, body):
    held = {f"{place}{body}{name}": tensor.clone() for name, tensor in clip().state_dict().items() if "position_ids" not in name}
    save_file(held, tmp_path / "base.safetensors")
    factors = {f"{body}{name}": each for name, each in pairs(clip(), CLIP).items()}
    adapter = write(tmp_path / "one.safetensors", as_diffusers({part: factors}))
    wanted = added(held, {f"{place}{name}": each for name, each in factors.items()}, 1.0)
    assert different(merged(tmp_path / "base.safetensors", adapter, tmp_path / "out"), wanted) == {}


def test_names_that_trainers_cut_off(tmp_path, bases):
    """Qwen3 without `model.`, spelled with underscores (Anima); `sformer_blocks` (FLUX.2)."""
    held = {
        f"model.layers.0.{name}": tensor.clone() for name, tensor in clip().state_dict().items() if name.endswith("proj.weight")
    }
    save_file(held, tmp_path / "base.safetensors")
    factors = {name.removesuffix(".weight"): (torch.ones(2, t.shape[1]), torch.ones(t.shape[0], 2)) for name, t in held.items()}
    short = {name.removeprefix("model."): each for name, each in factors.items()}
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_te": short}, alpha=2.0))
    assert different(merged(tmp_path / "base.safetensors", adapter, tmp_path / "out"), added(held, factors, 1.0)) == {}
    base, before = bases["diffusers"]
    double = {name: each for name, each in pairs(flux(), FLUX).items() if name.startswith("transformer_blocks.")}
    cut = {name.removeprefix("tran"): each for name, each in double.items()}
    adapter = write(tmp_path / "two.safetensors", as_diffusers({"diffusion_model": cut}))
    assert different(merged(base, adapter, tmp_path / "out"), added(before, double, 1.0)) == {}


def on_rows(held: Mapping[str, Tensor], name: str, rows: slice, factors: Pair) -> Tensor:
    A, B = factors
    weight = held[f"{name}.weight"].clone()
    weight[rows] = (weight[rows].double() + B.double() @ A.double()).float()
    return weight


def test_attention_processors_of_x_flux(tmp_path, bases):
    """Of image (1) and text (2); of a single block `qkv` is the first part of `linear1`, and the rest stays as it is."""
    torch.manual_seed(3)
    h = 16
    names = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * h, h),
        "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 3 * h, h),
        "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", h, h),
        "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", h, h),
        "single_blocks.0.processor.qkv_lora": ("single_blocks.0.linear1", 3 * h, h),
        "single_blocks.0.processor.proj_lora": ("single_blocks.0.linear2", h, 5 * h),
    }
    tensors, (base, held) = {}, bases["makers"]
    wanted = dict(held)
    for name, (target, out, inner) in names.items():
        A, B = torch.randn(2, inner), torch.randn(out, 2)
        tensors |= {f"{name}.down.weight": A, f"{name}.up.weight": B}
        wanted[f"{target}.weight"] = on_rows(held, target, slice(0, out), (A, B))
    adapter = write(tmp_path / "one.safetensors", tensors)
    assert different(merged(base, adapter, tmp_path / "out"), wanted) == {}
    found = merged(bases["diffusers"][0], adapter, tmp_path / "two")
    assert different(makers_of("FLUX.1", found), wanted) == {}


def test_parts_of_fused_weights_by_number(tmp_path, bases):
    """OMI's: thirds of `qkv`, and of `linear1` query, key, value and the rest; each with an alpha of its own."""
    torch.manual_seed(3)
    tensors, (base, held) = {}, bases["makers"]
    wanted = dict(held)
    for target, count in (("double_blocks.0.img_attn.qkv", 3), ("double_blocks.0.txt_attn.qkv", 3), ("single_blocks.0.linear1", 4)):
        for i in range(count):
            out = 64 if i == 3 else 16
            A, B = torch.randn(2, 16), torch.randn(out, 2)
            name = f"transformer.{target}.{i}"
            tensors |= {f"{name}.lora_down": A, f"{name}.lora_up": B, f"{name}.alpha": torch.tensor(1.0)}
            wanted[f"{target}.weight"] = on_rows(wanted, target, slice(16 * i, 16 * i + out), (A, B * 0.5))
    adapter = write(tmp_path / "one.safetensors", tensors)
    assert different(merged(base, adapter, tmp_path / "out"), wanted) == {}
    found = merged(bases["diffusers"][0], adapter, tmp_path / "two")
    assert different(makers_of("FLUX.1", found), wanted) == {}


@pytest.mark.parametrize(("stored", "trained", "factor"), [(1.0, "1.0", 0.5), (3.0, "1.0", 0.5), (3.0, "3.0", 1.5)])
@pytest.mark.parametrize("spelling", ["lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.double_blocks.0.img_attn.qkv"])
def test_the_metadata_tell_what_the_alpha_of_a_block_sparse_pair_is_of(tmp_path, bases, stored, trained, factor, spelling):
    """sd-scripts keeps alpha (each part at alpha / dim), musubi-tuner's converters multiply it by the number of parts."""
    torch.manual_seed(0)
    As, Bs = torch.randn(3, 2, 16), torch.randn(3, 16, 2)
    held = {f"{spelling}.lora_down.weight": As.flatten(0, 1), f"{spelling}.lora_up.weight": torch.block_diag(*Bs)}
    held |= {f"{spelling}.alpha": torch.tensor(stored)}
    adapter = write(tmp_path / "one.safetensors", held, {"ss_network_alpha": trained, "ss_network_dim": "2"})
    base, before = bases["makers"]
    found = merged(base, adapter, tmp_path / "out")
    update = (factor * (Bs.double() @ As.double())).flatten(0, 1)
    name = "double_blocks.0.img_attn.qkv.weight"
    assert different(found, before | {name: (before[name].double() + update).float()}) == {}
    untold = write(tmp_path / "two.safetensors", held)
    refused(base, [untold], AdapterError, "sd-scripts", "musubi-tuner", "split_qkv='trained'", "split_qkv='stored'")
    odd = write(tmp_path / "three.safetensors", held, {"ss_network_alpha": "7"})
    refused(base, [odd], AdapterError, "no ss_network_alpha that tells")


@pytest.mark.parametrize("make", [as_kohya, as_diffusers])
def test_textual_inversions_beside_are_left_out_and_said(tmp_path, bases, make):
    factors = pairs(flux(), FLUX)
    tensors = as_kohya({"lora_unet": factors}, 2.0) if make is as_kohya else as_diffusers({"transformer": factors})
    beside = {"bundle_emb.word.string_to_param.*": torch.ones(2, 4), "bundle_emb.word.clip_l": torch.ones(2, 4)}
    adapter = write(tmp_path / "one.safetensors", tensors | beside)
    base, held = bases["diffusers"]
    assert different(merged(base, adapter, tmp_path / "out"), added(held, factors, 1.0)) == {}
    plan = lorafold.plan(base, [adapter])
    assert any("textual inversion" in note for note in plan.notes)
    assert set(beside) <= set(plan.adapters[0].left_out)


def test_two_families_in_one_file(tmp_path, bases):
    """What is of another model has no place, and nothing is merged of the rest."""
    factors = pairs(flux(), FLUX)
    other = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (torch.ones(2, 16), torch.ones(16, 2))}
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"transformer": {**factors, **other}}))
    for base, _ in bases.values():
        refused(base, [adapter], lorafold.errors.UnmatchedAdapterError, "down_blocks.0.attentions.0")

"""diffusers' files: new keys and old, the factor from metadata, tensors or rank; against kohya's keys and diffusers' own fusing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorafold
from diffusion import CLIP, FLUX, UNET, added, as_diffusers, as_kohya, clip, flux, metadata, pairs, quietly, unet, weights, write
from lorafold import ReadOptions
from lorafold.errors import AdapterConfigError, AdapterError, UnmatchedAdapterError, UnsupportedAdapterError
from models import different, refused

MODELS = {"unet": (unet, UNET), "transformer": (flux, FLUX)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A UNet, a FLUX transformer and a text encoder, a folder each."""
    path = tmp_path_factory.mktemp("models")
    for name, model in (("unet", unet()), ("transformer", flux()), ("text_encoder", clip())):
        quietly(lambda name=name, model=model: model.save_pretrained(path / name))
    return path


def scalings(base: Path, adapter: Path, **options: Any) -> dict[str, float]:
    plan = lorafold.plan(base, [adapter], read_options=ReadOptions(**options))
    return {step.tensor: step.addends[0].scaling for step in plan.steps if step.addends}


def config(r: int = 2, lora_alpha: float = 3, **fields: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": lora_alpha, "peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}, **fields}


@pytest.mark.parametrize("kind", MODELS)
def test_kohya_and_diffusers_keys_of_one_update_give_one_merge(tmp_path, saved, kind):
    """Equal bits, which are those of the sum rounded once; and what diffusers itself fuses, to the rounding of its float32 sums.

    It rounds each of the product of r = 2 terms, the scaling and the sum, so that it is off by less than 4 steps of the largest
    of the numbers that meet: all weights and updates here are below 4.
    """
    make, ends = MODELS[kind]
    factors = pairs(make(), ends)
    new = write(tmp_path / "new.safetensors", as_diffusers({kind: factors}), metadata({kind: config(target_modules=list(factors))}))
    prefix = {"unet": "lora_unet", "transformer": "lora_unet"}[kind]
    kohya = write(tmp_path / "kohya.safetensors", as_kohya({prefix: factors}, alpha=3.0))
    for adapter in (new, kohya):
        lorafold.merge(saved / kind, [adapter], tmp_path / adapter.stem)
    found = weights(tmp_path / "new")
    assert different(found, weights(tmp_path / "kohya")) == {}
    assert different(found, added(weights(saved / kind), factors, 1.5)) == {}
    model = make()
    with torch.no_grad():
        quietly(lambda: model.load_lora_adapter(str(new), prefix=kind, use_safetensors=True))  # else it drops the metadata
        quietly(model.fuse_lora)
    fused = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".lora_" not in name}
    assert found.keys() == fused.keys()
    assert max(float((found[name] - fused[name]).abs().max()) for name in found) < 4 * 2.0**-22


def test_older_keys_of_attention_processors(tmp_path, saved):
    factors = pairs(unet(), ("attn1.to_q", "attn2.to_k", "attn1.to_out.0"))
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in factors.items():
        block, _, last = name.partition(".to_")
        old = f"{block}.processor.to_{last.removesuffix('.0')}_lora"
        tensors |= {f"unet.{old}.down.weight": A, f"unet.{old}.up.weight": B}
    bare = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
    for i, held in enumerate((tensors, bare)):
        lorafold.merge(saved / "unet", [write(tmp_path / f"{i}.safetensors", held)], tmp_path / f"out{i}")
        assert different(weights(tmp_path / f"out{i}"), added(weights(saved / "unet"), factors, 1.0)) == {}


@pytest.mark.parametrize("form", ["lora.{}.weight", "lora_linear_layer.{}.weight", "lora_{}.weight"])
def test_older_keys_of_layers(tmp_path, saved, form):
    factors = pairs(clip(), CLIP)
    held = {f"text_encoder.text_model.{n}.{form.format('down')}": A for n, (A, _) in factors.items()}
    held |= {f"text_encoder.text_model.{n}.{form.format('up')}": B for n, (_, B) in factors.items()}
    lorafold.merge(saved / "text_encoder", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    assert different(weights(tmp_path / "out"), added(weights(saved / "text_encoder"), factors, 1.0)) == {}


def test_processors_of_a_text_encoder(tmp_path, saved):
    factors = pairs(clip(), ("q_proj", "out_proj"))
    old = {"q_proj": "to_q_lora", "out_proj": "to_out_lora"}
    held = {}
    for name, (A, B) in factors.items():
        block, _, last = name.rpartition(".")
        held |= {f"text_encoder.{block}.{old[last]}.down.weight": A, f"text_encoder.{block}.{old[last]}.up.weight": B}
    lorafold.merge(saved / "text_encoder", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    assert different(weights(tmp_path / "out"), added(weights(saved / "text_encoder"), factors, 1.0)) == {}


def test_the_prefix_of_the_original_code(tmp_path, saved):
    """ComfyUI's `diffusion_model.`, where the rest of the name is the base's."""
    factors = pairs(flux(), FLUX)
    held = as_diffusers({"diffusion_model": factors})
    lorafold.merge(saved / "transformer", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    assert different(weights(tmp_path / "out"), added(weights(saved / "transformer"), factors, 1.0)) == {}


def test_alpha_from_metadata(tmp_path, saved):
    """With PEFT's patterns and rsLoRA, as PEFT reads them."""
    factors = pairs(unet(), ("attn1.to_q",)) | pairs(unet(), ("proj_in",), r=4)
    remarks = metadata({"unet": config(lora_alpha=3, use_rslora=True, rank_pattern={"proj_in": 4}, alpha_pattern={"proj_in": 8})})
    found = scalings(saved / "unet", write(tmp_path / "one.safetensors", as_diffusers({"unet": factors}), remarks))
    assert {scaling for name, scaling in found.items() if "proj_in" in name} == {4.0}
    assert {scaling for name, scaling in found.items() if "to_q" in name} == {3 / 2**0.5}


def test_without_alpha_it_is_the_rank_of_each_module(tmp_path, saved):
    """diffusers took one module's rank for all, before its #14409."""
    factors = pairs(unet(), ("attn1.to_q",)) | pairs(unet(), ("proj_in",), r=4)
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"unet": factors}))
    assert set(scalings(saved / "unet", adapter).values()) == {1.0}
    assert any("no alpha" in note for note in lorafold.plan(saved / "unet", [adapter]).notes)


def test_alpha_tensors(tmp_path, saved):
    """Of a transformer they count, as for diffusers; of a UNet diffusers ignores them, and it is asked which is meant."""
    for kind, (make, ends) in MODELS.items():
        factors = pairs(make(), ends[:2])
        held = as_diffusers({kind: factors}) | {f"{kind}.{name}.alpha": torch.tensor(6.0) for name in factors}
        adapter = write(tmp_path / f"{kind}.safetensors", held)
        if kind == "unet":
            refused(
                saved / kind, [adapter], AdapterError, "alpha_tensors='ignore')` or `ReadOptions(alpha_tensors='use')`", ".alpha"
            )
            assert set(scalings(saved / kind, adapter, alpha_tensors="ignore").values()) == {1.0}
        assert set(scalings(saved / kind, adapter, alpha_tensors="use" if kind == "unet" else None).values()) == {3.0}


def test_alpha_tensors_against_metadata(tmp_path, saved):
    factors = pairs(flux(), FLUX[:1])
    held = as_diffusers({"transformer": factors}) | {f"transformer.{name}.alpha": torch.tensor(6.0) for name in factors}
    same = write(tmp_path / "same.safetensors", held, metadata({"transformer": config(lora_alpha=6)}))
    assert set(scalings(saved / "transformer", same).values()) == {3.0}
    other = write(tmp_path / "other.safetensors", held, metadata({"transformer": config(lora_alpha=5)}))
    refused(saved / "transformer", [other], AdapterError, ".alpha", "lora_adapter_metadata", "not of one training run")


def test_dora(tmp_path, saved):
    """Against diffusers, which rounds in float32: the norms, products and quotients to some steps of numbers below 4."""
    factors = pairs(unet(), ("attn1.to_q", "conv1"))
    torch.manual_seed(4)
    held = as_diffusers({"unet": factors})
    for name, (_, B) in factors.items():
        size = (1, B.shape[0], 1, 1) if B.dim() == 4 else (B.shape[0],)
        held[f"unet.{name}.lora_magnitude_vector"] = torch.rand(size) + 0.5
    adapter = write(tmp_path / "one.safetensors", held, metadata({"unet": config(use_dora=True, target_modules=list(factors))}))
    lorafold.merge(saved / "unet", [adapter], tmp_path / "out")
    found, model = weights(tmp_path / "out"), unet()
    with torch.no_grad():
        quietly(lambda: model.load_lora_adapter(str(adapter), prefix="unet", use_safetensors=True))
        quietly(model.fuse_lora)
    fused = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if ".lora_" not in name}
    assert found.keys() == fused.keys()
    assert max(float((found[name] - fused[name]).abs().max()) for name in found) < 16 * 2.0**-22
    lacking = {name: tensor for name, tensor in held.items() if name != next(n for n in held if "magnitude" in n)}
    for remarks in (metadata({"unet": config(use_dora=True)}), None):
        adapter = write(tmp_path / "two.safetensors", lacking, remarks)
        refused(saved / "unet", [adapter], AdapterError, "has no lora_magnitude_vector")


def test_lora_bias(tmp_path, saved):
    """Scaled and added to the layer's own bias."""
    factors = pairs(unet(), ("attn1.to_out.0",))
    biases = {name: torch.randn(B.shape[0]) for name, (_, B) in factors.items()}
    held = as_diffusers({"unet": factors}) | {f"unet.{name}.lora_B.bias": bias for name, bias in biases.items()}
    adapter = write(tmp_path / "one.safetensors", held, metadata({"unet": config(lora_bias=True)}))
    lorafold.merge(saved / "unet", [adapter], tmp_path / "out")
    base = weights(saved / "unet")
    wanted = added(base, factors, 1.5)
    for name, bias in biases.items():
        wanted[f"{name}.bias"] = (base[f"{name}.bias"].double() + 1.5 * bias.double()).float()
    assert different(weights(tmp_path / "out"), wanted) == {}


def test_parts_of_other_components(tmp_path, saved):
    held = as_diffusers({"unet": pairs(unet(), UNET[:1]), "text_encoder": pairs(clip(), CLIP)})
    adapter = write(tmp_path / "one.safetensors", held)
    refused(saved / "unet", [adapter], UnmatchedAdapterError, "2 modules for text_encoder", "component='unet'")
    assert all("to_q" in name for name in scalings(saved / "unet", adapter, component="unet"))
    assert len(scalings(saved / "text_encoder", adapter, component="text_encoder")) == 2


def test_refused(tmp_path, saved):
    A, B = torch.ones(2, 8), torch.ones(8, 2)
    held = {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": A, "unet.down_blocks.0.attentions.0.proj_in.lora_B.weight": B}
    name = "unet.down_blocks.0.attentions.0.proj_in"

    def one(
        error: type, *words: str, drop: str = "", remarks: dict[str, Any] | None = None, text: str | None = None, **more: Tensor
    ) -> None:
        tensors = {
            each: t for each, t in (held | {f"{name}.{k}": t for k, t in more.items()}).items() if not drop or drop not in each
        }
        meta = {"lora_adapter_metadata": text} if text else metadata({"unet": remarks}) if remarks else None
        refused(saved / "unet", [write(tmp_path / "one.safetensors", tensors, meta)], error, *words)

    one(AdapterError, "no lora_up", "lora_A", drop="lora_B")
    one(AdapterError, "is no part of a LoRA pair", f"{name}.lora_C.weight", **{"lora_C.weight": A})
    one(AdapterError, "are the same part", f"{name}.lora.down.weight", **{"lora.down.weight": A})
    one(AdapterError, "lora_bias is false", **{"lora_B.bias": torch.ones(8)}, remarks=config())
    one(AdapterError, "must be [8]", **{"lora_B.bias": torch.ones(7)})
    one(AdapterError, "8 numbers", lora_magnitude_vector=torch.ones(7))
    one(AdapterError, "has a lora_magnitude_vector, use_dora being false", lora_magnitude_vector=torch.ones(8), remarks=config())
    one(AdapterConfigError, "r says rank 3", remarks=config(r=3))
    one(AdapterError, "holds nothing for to_q of target_modules", remarks=config(target_modules=["proj_in", "to_q"]))
    one(UnsupportedAdapterError, "changes the base weight", remarks=config(init_lora_weights="pissa"))
    one(UnsupportedAdapterError, "not known", remarks=config(use_magic=True))
    one(AdapterConfigError, "must hold an object", text="[1]")
    one(AdapterConfigError, "lora_adapter_metadata", text="{")
    one(AdapterError, "a configuration for transformer", text='{"transformer.r": 2}')

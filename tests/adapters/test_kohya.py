"""kohya's files: names matched with the base's own, the factor, FLUX's split projections, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from diffusion import CLIP, FLUX, UNET, added, as_kohya, clip, flux, pairs, quietly, sdxl, unet, weights, write
from lorafold import ReadOptions
from lorafold.errors import AdapterError, AmbiguousNameError, ShapeMismatchError, UnmatchedAdapterError
from lorafold.planning.names.makers.slots import maker_slots
from models import different, refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A UNet, a FLUX transformer and a text encoder, a folder each."""
    path = tmp_path_factory.mktemp("models")
    for name, model in (("unet", unet()), ("flux", flux()), ("clip", clip())):
        quietly(lambda name=name, model=model: model.save_pretrained(path / name))
    return path


@pytest.fixture
def plain(tmp_path) -> Path:
    """A checkpoint of two layers whose names have dots and underscores in different places."""
    (tmp_path / "base").mkdir()
    names = {"a.b_c.weight": (4, 6), "a.d.weight": (4, 6), "conv.weight": (4, 6, 1, 1), "conv3.weight": (4, 6, 3, 3)}
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def pair(name: str, A: tuple[int, ...] = (2, 6), B: tuple[int, ...] = (4, 2), alpha: float | None = 1.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tensors = {f"{name}.lora_down.weight": torch.randn(A), f"{name}.lora_up.weight": torch.randn(B)}
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


@pytest.mark.parametrize(("kind", "make", "ends"), [("unet", unet, UNET), ("flux", flux, FLUX)])
def test_every_name_of_a_model_is_found(tmp_path, saved, kind, make, ends):
    """Names of attention blocks, residual blocks and embedders, all spelled with underscores; the sum is correctly rounded."""
    factors = pairs(make(), ends)
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_unet": factors}, alpha=3.0))
    lorafold.merge(saved / kind, [(adapter, 0.5)], tmp_path / "out")
    assert different(weights(tmp_path / "out"), added(weights(saved / kind), factors, 0.5 * 1.5)) == {}
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()
    lorafold.verify(tmp_path / "out", saved / kind, [(adapter, 0.5)]).raise_for_failures()


@pytest.mark.parametrize(("make", "ends"), [(unet, UNET), (flux, FLUX)])
def test_into_a_model_in_memory(tmp_path, make, ends):
    """The bits of merged files, and the model's own again after; FLUX also under its makers' names."""
    model, factors = make(), pairs(make(), ends)
    held, before = as_kohya({"lora_unet": factors}, alpha=3.0), {name: t.clone() for name, t in model.state_dict().items()}
    with lorafold.merge_into(model, [write(tmp_path / "one.safetensors", held)]):
        assert different(dict(model.state_dict()), added(before, factors, 1.5)) == {}
    assert different(dict(model.state_dict()), before) == {}
    if make is flux:
        fused = pair("lora_unet_double_blocks_0_img_attn_qkv", (2, 16), (48, 2))
        with lorafold.merge_into(model, [write(tmp_path / "two.safetensors", fused)]):
            assert len(different(dict(model.state_dict()), before)) == 3


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1", "lora_te2"])
@pytest.mark.parametrize("inside", ["text_model.", ""])
def test_text_encoders_with_and_without_text_model(tmp_path, saved, prefix, inside):
    """transformers 5 leaves `text_model.` out of the names of a CLIP text encoder; trainers did not."""
    factors = pairs(clip(), CLIP)
    held = as_kohya({prefix: {f"{inside}{name}": factor for name, factor in factors.items()}}, alpha=2.0)
    base = shutil.copytree(saved / "clip", tmp_path / "base")
    for _ in range(2):
        lorafold.merge(base, [write(tmp_path / "one.safetensors", held)], tmp_path / "out", overwrite=True)
        found = {name.removeprefix("text_model."): tensor for name, tensor in weights(tmp_path / "out").items()}
        assert different(found, added(weights(saved / "clip"), factors, 1.0)) == {}
        save_file({f"text_model.{name}": t for name, t in weights(saved / "clip").items()}, base / "model.safetensors")


def test_names_of_the_original_code_of_latent_diffusion(tmp_path, saved):
    """SDXL's adapters are trained with them; the base has diffusers' names."""
    names = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "down_blocks.1.resnets.0.conv1": "input_blocks_3_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.1.attentions.1.proj_out": "output_blocks_3_1_proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_1_1_conv",
        "time_embedding.linear_2": "time_embed_2",
    }
    factors = {name: factor for name, factor in pairs(unet(), tuple(names)).items() if name in names}
    assert factors.keys() == names.keys()
    held = as_kohya({"lora_unet": {names[name]: factor for name, factor in factors.items()}}, alpha=2.0)
    lorafold.merge(saved / "unet", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    assert different(weights(tmp_path / "out"), added(weights(saved / "unet"), factors, 1.0)) == {}


def test_every_layer_of_sdxl_under_the_original_names(tmp_path):
    """Against diffusers' own conversion of such an adapter, which is then read in diffusers' names."""
    from diffusers.loaders import lora_conversion_utils as conversion

    model = sdxl()
    quietly(lambda: model.save_pretrained(tmp_path / "base"))
    factors = pairs(model, ("",))
    slots = maker_slots({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    called = {slot.tensor: name for name, (slot,) in slots.items()}
    original = {called[f"{name}.weight"].removesuffix(".weight"): factor for name, factor in factors.items()}
    held = as_kohya({"lora_unet": original}, alpha=2.0)
    assert len(held) == 3 * len(factors) == 3 * 313
    lorafold.merge(tmp_path / "base", [write(tmp_path / "one.safetensors", held)], tmp_path / "one")
    assert different(weights(tmp_path / "one"), added(weights(tmp_path / "base"), factors, 1.0)) == {}
    mapped = conversion._maybe_map_sgm_blocks_to_diffusers(dict(held), model.config)
    converted, alphas = conversion._convert_non_diffusers_lora_to_diffusers(mapped)
    assert set(alphas.values()) == {2.0}
    lorafold.merge(tmp_path / "base", [write(tmp_path / "two.safetensors", converted)], tmp_path / "two")
    assert different(weights(tmp_path / "two"), weights(tmp_path / "one")) == {}


def test_one_file_with_all_parts(tmp_path, saved):
    """As the original code saves a model: each part under a prefix of its own."""
    unets, texts = pairs(unet(), ("attn1.to_q",)), pairs(clip(), CLIP)
    base = {f"model.diffusion_model.{name}": t for name, t in weights(saved / "unet").items()}
    base |= {f"cond_stage_model.transformer.text_model.{name}": t for name, t in weights(saved / "clip").items()}
    save_file(base, tmp_path / "base.safetensors")
    held = as_kohya({"lora_unet": unets, "lora_te": {f"text_model.{name}": f for name, f in texts.items()}}, alpha=2.0)
    lorafold.merge(tmp_path / "base.safetensors", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    wanted = added(base, {f"model.diffusion_model.{name}": f for name, f in unets.items()}, 1.0)
    wanted = added(wanted, {f"cond_stage_model.transformer.text_model.{name}": f for name, f in texts.items()}, 1.0)
    assert different(weights(tmp_path / "out"), wanted) == {}


def test_kernels_of_one_on_linear_layers_and_none_on_convolutions(tmp_path, plain):
    """4-D tensors on a linear layer are squeezed, 2-D ones on a 1 × 1 convolution unfolded."""
    held = pair("lora_unet_a_d", (2, 6, 1, 1), (4, 2, 1, 1)) | pair("lora_unet_conv")
    lorafold.merge(plain, [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    found = weights(tmp_path / "out")
    for name, shape in (("a_d", (4, 6)), ("conv", (4, 6, 1, 1))):
        A, B = (held[f"lora_unet_{name}.{part}.weight"].double().flatten(1) for part in ("lora_down", "lora_up"))
        assert torch.equal(found[f"{name.replace('_', '.')}.weight"], (0.5 * B @ A).float().view(shape))


def test_a_name_that_two_modules_share(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"a.b_c.weight": torch.zeros(4, 6), "a_b.c.weight": torch.zeros(4, 6)}, tmp_path / "base" / "model.safetensors")
    adapter = write(tmp_path / "one.safetensors", pair("lora_unet_a_b_c"))
    refused(tmp_path / "base", [adapter], AmbiguousNameError, "lora_unet_a_b_c", "a.b_c.weight", "a_b.c.weight")


def test_names_that_the_base_has_not(tmp_path, plain):
    held = pair("lora_unet_a_d") | pair("lora_unet_a_dd")
    refused(plain, [write(tmp_path / "one.safetensors", held)], UnmatchedAdapterError, "lora_unet_a_dd", "1 of 2")


def test_a_part_that_the_base_has_not(tmp_path, plain):
    """Named with what to do; `component` takes the one that it has."""
    held = pair("lora_unet_a_d") | pair("lora_te_text_model_x") | pair("lora_te_text_model_y")
    adapter = write(tmp_path / "one.safetensors", held)
    refused(plain, [adapter], UnmatchedAdapterError, "2 modules for lora_te", "component='unet'", "lora_te_text_model_x")
    plan = lorafold.plan(plain, [adapter], read_options=ReadOptions(component="unet"))
    assert plan.count("merge") == 1
    assert any("left out: 2 of lora_te" in note for note in plan.notes)
    plan = lorafold.plan(plain, [adapter], allow_partial=True)
    assert (plan.count("merge"), plan.unmatched) == (1, ("lora_te_text_model_x", "lora_te_text_model_y"))
    refused(plain, [adapter], AdapterError, "did you mean text_encoder?", read_options=ReadOptions(component="text_encode"))


def test_without_alpha_the_factor_is_one_and_said(tmp_path, plain):
    plan = lorafold.plan(plain, [write(tmp_path / "one.safetensors", pair("lora_unet_a_d", alpha=None))])
    (addend,) = next(step for step in plan.steps if step.action == "merge").addends
    assert (addend.scaling, addend.why) == (1.0, "alpha missing, so it is dim 2: 1")
    assert any("no alpha" in note for note in plan.notes)
    plan = lorafold.plan(plain, [write(tmp_path / "two.safetensors", pair("lora_unet_a_d", (4, 6), (4, 4), alpha=0.0))])
    (addend,) = next(step for step in plan.steps if step.action == "merge").addends
    assert (addend.scaling, addend.why) == (1.0, "alpha 0, so it is dim 4: 1")


@pytest.mark.parametrize("alpha", [torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0).bfloat16()])
def test_alphas_of_any_type(tmp_path, plain, alpha):
    held = pair("lora_unet_a_d") | {"lora_unet_a_d.alpha": alpha}
    plan = lorafold.plan(plain, [write(tmp_path / "one.safetensors", held)])
    assert [step.addends[0].scaling for step in plan.steps if step.addends] == [2.0]


def test_some_modules_without_alpha(tmp_path, plain):
    """Which strength they were trained with cannot be told: it is asked for."""
    adapter = write(tmp_path / "one.safetensors", pair("lora_unet_a_d") | pair("lora_unet_a_b_c", alpha=None))
    refused(plain, [adapter], AdapterError, "lora_unet_a_b_c", "lora_alpha=")
    plan = lorafold.plan(plain, [adapter], read_options=ReadOptions(lora_alpha=4.0))
    assert {step.tensor: step.addends[0].scaling for step in plan.steps if step.addends} == {"a.d.weight": 0.5, "a.b_c.weight": 2.0}


@pytest.mark.parametrize("parts", [3, 4])
def test_projections_that_were_trained_apart(tmp_path, parts):
    """sd-scripts joins the parts of FLUX's qkv with alpha as it was: the factor is that of each part, or of all, as asked."""
    torch.manual_seed(0)
    dim, out = 2, 6
    save_file({"img_attn.qkv.weight": torch.zeros(out * parts, 5)}, tmp_path / "base.safetensors")
    As, Bs = torch.randn(parts, dim, 5), torch.randn(parts, out, dim)
    held = {
        "lora_unet_img_attn_qkv.lora_down.weight": As.flatten(0, 1),
        "lora_unet_img_attn_qkv.lora_up.weight": torch.block_diag(*Bs),
        "lora_unet_img_attn_qkv.alpha": torch.tensor(1.0),
    }
    adapter = write(tmp_path / "one.safetensors", held)
    base = tmp_path / "base.safetensors"
    refused(
        base,
        [adapter],
        AdapterError,
        "block-sparse",
        "lora_unet_img_attn_qkv",
        "split_qkv='trained')` or `ReadOptions(split_qkv='stored')`",
    )
    for wanted, factor in (("trained", 1 / dim), ("stored", 1 / (dim * parts))):
        options = ReadOptions(split_qkv=wanted)
        lorafold.merge(base, [adapter], tmp_path / wanted, dtype="F64", read_options=options)
        found = weights(tmp_path / wanted)["img_attn.qkv.weight"]
        assert torch.allclose(found, factor * (Bs.double() @ As.double()).flatten(0, 1), rtol=1e-14)


def test_a_dense_up_is_not_taken_for_a_split_one(tmp_path, plain):
    plan = lorafold.plan(plain, [write(tmp_path / "one.safetensors", pair("lora_unet_a_d", (3, 6), (4, 3)))])
    assert plan.count("merge") == 1


@pytest.mark.parametrize(
    ("held", "error", "words"),
    [
        (pair("lora_unet_a_d") | {"lora_unet_a_d.lora_dwn.weight": torch.ones(1)}, AdapterError, "lora_unet_a_d.lora_dwn.weight"),
        (pair("lora_unet_a_d") | {"lora_unet_a_d.lora_A.weight": torch.ones(2, 6)}, AdapterError, "are the same part"),
        ({"lora_unet_a_d.lora_up.weight": torch.ones(4, 2)}, AdapterError, "no lora_down"),
        (pair("lora_unet_a_d", (2, 6), (4, 3)), AdapterError, "lora_unet_a_d.lora_up.weight"),
        (pair("lora_unet_a_d", (2, 6), (4, 2, 1)), AdapterError, "lora_unet_a_d.lora_up.weight"),
        (pair("lora_unet_a_d", (2, 7)), ShapeMismatchError, "lora_unet_a_d"),
        (pair("lora_unet_conv3", (2, 6, 3, 1), (4, 2, 1, 1)), ShapeMismatchError, "lora_unet_conv3"),
        (pair("lora_unet_a_d", alpha=float("nan")), AdapterError, "expected a finite number"),
        (pair("lora_unet_a_d") | {"lora_unet_a_d.alpha": torch.ones(2)}, AdapterError, "must be one number"),
        (pair("lora_unet_a_d") | {"lora_unet_a_d.lora_down.weight": torch.ones(2, 6).int()}, AdapterError, "I32"),
    ],
)
def test_refused(tmp_path, plain, held, error, words):
    refused(plain, [write(tmp_path / "one.safetensors", held)], error, words)


def test_names_of_the_makers_of_flux(tmp_path, saved):
    """Onto a base in diffusers' form, against diffusers' own conversion of the adapter; it takes linear1 apart for one size only.

    That one multiplies the factor into its float32 numbers, so that it is compared where alpha / dim is a power of two.
    """
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    torch.manual_seed(2)
    shapes = {
        "double_blocks_0_img_attn_qkv": (48, 16), "double_blocks_0_txt_attn_qkv": (48, 16),
        "double_blocks_0_img_attn_proj": (16, 16), "double_blocks_0_txt_attn_proj": (16, 16),
        "double_blocks_0_img_mlp_0": (64, 16), "double_blocks_0_txt_mlp_2": (16, 64),
        "double_blocks_0_img_mod_lin": (96, 16), "double_blocks_0_txt_mod_lin": (96, 16), "single_blocks_0_linear2": (16, 80),
        "single_blocks_0_modulation_lin": (48, 16), "img_in": (16, 4), "txt_in": (16, 16), "time_in_in_layer": (16, 256),
        "vector_in_out_layer": (16, 16), "final_layer_linear": (4, 16), "final_layer_adaLN_modulation_1": (32, 16),
    }  # fmt: skip
    held = {}
    for name, (out, inner) in shapes.items():
        held |= pair(f"lora_unet_{name}", (2, inner), (out, 2), alpha=2.0 if "final" in name else 1.0)
    lorafold.merge(saved / "flux", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    converted = _convert_kohya_flux_lora_to_diffusers(dict(held))
    plain = {name if name.startswith("transformer.") else f"transformer.{name}": tensor for name, tensor in converted.items()}
    lorafold.merge(saved / "flux", [write(tmp_path / "two.safetensors", plain)], tmp_path / "two")
    assert different(weights(tmp_path / "out"), weights(tmp_path / "two")) == {}
    assert len(different(weights(tmp_path / "out"), weights(saved / "flux"))) == len(shapes) + 4


def test_linear1_of_flux(tmp_path, saved):
    """Query, key, value and the MLP's input in one: each gets its rows."""
    base = weights(saved / "flux")
    names = [f"single_transformer_blocks.0.{name}.weight" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    held = pair("lora_unet_single_blocks_0_linear1", (2, 16), (16 * 3 + 64, 2))
    lorafold.merge(saved / "flux", [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    A, B = (held[f"lora_unet_single_blocks_0_linear1.{part}.weight"].double() for part in ("lora_down", "lora_up"))
    wanted = torch.cat([base[name] for name in names]).double() + 0.5 * B @ A
    assert torch.equal(torch.cat([weights(tmp_path / "out")[name] for name in names]), wanted.float())

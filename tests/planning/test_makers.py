"""Makers' names and diffusers': the table against diffusers' conversion of checkpoints, adapters of either on bases of either.

An adapter merged in the makers' names into the makers' file, which diffusers then converts, gives the bits of the same adapter
merged into diffusers' folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorafold
from diffusion import added, as_diffusers, as_kohya, pairs, write
from lorafold.errors import PlanError, UnmatchedAdapterError, UnsupportedAdapterError
from lorafold.planning.names.makers.lines import FAMILIES
from lorafold.planning.names.makers.rules import rules_of
from lorafold.planning.names.makers.slots import maker_slots
from makers import CASES, converted, makers_of, open_clip, taken
from models import different, refused

Named = dict[str, Tensor]


def made(name: str) -> tuple[str, Any, Named, Named]:
    """The family's name, its tiny model, and its tensors in diffusers' names and in its makers'."""
    model = CASES[name].make()
    held = dict(model.state_dict())
    return name, model, held, makers_of(name, held)


@pytest.fixture(scope="module", params=CASES)
def family(request) -> tuple[str, Any, Named, Named]:
    return made(request.param)


@pytest.fixture(scope="module", params=[name for name in CASES if name != "SDXL"])
def small(request) -> tuple[str, Any, Named, Named]:
    """The same of all but SDXL, whose 1 700 weights are merged with those of its text encoders in `test_image_matrix.py`."""
    return made(request.param)


def saved(path: Path, tensors: Named, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def merged(base: Path, adapter: Path, out: Path, prefix: str = "") -> Named:
    from safetensors.torch import load_file

    lorafold.merge(base, [adapter], out, overwrite=True)
    found: Named = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def back(name: str, model: Any, tensors: Named) -> Named:
    return converted(CASES[name], tensors, dict(model.config))


def random_pairs(tensors: Named, seed: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors for every matrix and kernel of a base."""
    torch.manual_seed(seed)
    return {
        name.removesuffix(".weight"): (
            torch.randn(2, *tensor.shape[1:]) * 0.3,
            torch.randn(tensor.shape[0], 2, *(1,) * (tensor.dim() - 2)),
        )
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() > 1
    }


def test_the_table_is_what_diffusers_does(family):
    """Each tensor in the makers' names is taken back by diffusers' converter, all bits and none beside."""
    name, model, held, makers = family
    assert set(makers) != set(held)
    assert different(back(name, model, makers), held) == {}


def test_exactly_one_family_is_told(family):
    _, _, held, makers = family
    assert len([each for each in FAMILIES if each.side(held)]) == len([each for each in FAMILIES if each.side(makers)]) == 1
    assert [each.side(held) for each in FAMILIES if each.side(held)] == ["diffusers"]
    assert [each.side(makers) for each in FAMILIES if each.side(makers)] == ["makers"]


def test_no_name_means_two_weights(family):
    """What a base calls by some name is not something else on the other side."""
    _, _, held, makers = family
    for base, other in ((held, makers), (makers, held)):
        slots = maker_slots({name: tuple(tensor.shape) for name, tensor in base.items()})
        for name in other.keys() - base.keys():
            assert torch.equal(taken(slots[name], base), other[name]), name
        for name in base.keys() & other.keys():
            assert torch.equal(base[name], other[name]), name


@pytest.mark.parametrize(("spelling", "prefix"), [("kohya", "model.diffusion_model."), ("dotted", "")])
def test_an_adapter_of_diffusers_names_on_the_makers_file(tmp_path, small, spelling, prefix):
    """Rows of a fused weight, halves that have changed places, and all others, for every linear layer and convolution."""
    name, model, held, makers = small
    factors = pairs(model, ("",)) if model.__class__.__name__.startswith("UNet") else random_pairs(held)
    tensors = as_kohya({"lora_unet": factors}, alpha=1.0) if spelling == "kohya" else as_diffusers({"transformer": factors})
    adapter = write(tmp_path / "one.safetensors", tensors)
    found = merged(saved(tmp_path / "base.safetensors", makers, prefix), adapter, tmp_path / "out", prefix)
    wanted = added(held, factors, 0.5 if spelling == "kohya" else 1.0)
    assert different(back(name, model, found), wanted) == {}


@pytest.mark.parametrize("spelling", ["kohya", "dotted"])
def test_an_adapter_of_makers_names_on_either(tmp_path, small, spelling):
    name, model, held, makers = small
    factors = random_pairs(makers)
    tensors = as_kohya({"lora_unet": factors}, alpha=1.0) if spelling == "kohya" else as_diffusers({"diffusion_model": factors})
    adapter = write(tmp_path / "one.safetensors", tensors)
    own = merged(saved(tmp_path / "makers.safetensors", makers, "net."), adapter, tmp_path / "own", "net.")
    wanted = added(makers, factors, 0.5 if spelling == "kohya" else 1.0)
    assert different(own, wanted) == {}
    other = merged(saved(tmp_path / "diffusers.safetensors", held), adapter, tmp_path / "other")
    assert different(back(name, model, own), other) == {}


def test_biases_whole_differences_and_norms_on_either(tmp_path, small):
    """LyCORIS's whole differences of weights, biases and norms: rows and halves of vectors."""
    name, model, held, makers = small
    torch.manual_seed(5)
    tensors = {}
    for each, tensor in makers.items():
        module, _, kind = each.rpartition(".")
        if kind == "bias" and f"{module}.weight" in makers:
            tensors |= {f"diffusion_model.{module}.diff_b": torch.randn(tensor.shape)}
            tensors |= {f"diffusion_model.{module}.diff": torch.randn(makers[f"{module}.weight"].shape)}
    if not tensors:  # a family without biases
        matrices = {each: tensor for each, tensor in makers.items() if each.endswith(".weight") and tensor.dim() > 1}
        tensors = {
            f"diffusion_model.{each.removesuffix('.weight')}.diff": torch.randn(tensor.shape) for each, tensor in matrices.items()
        }
    adapter = write(tmp_path / "one.safetensors", tensors)
    wanted = dict(makers)
    for each, tensor in tensors.items():
        module, _, part = each.removeprefix("diffusion_model.").rpartition(".")
        target = f"{module}.{'bias' if part == 'diff_b' else 'weight'}"
        wanted[target] = (makers[target].double() + tensor.double()).float()
    assert different(merged(saved(tmp_path / "makers.safetensors", makers), adapter, tmp_path / "own"), wanted) == {}
    other = merged(saved(tmp_path / "diffusers.safetensors", held), adapter, tmp_path / "other")
    assert different(other, back(name, model, wanted)) == {}


def test_into_a_model_in_memory(tmp_path, small):
    """The bits of merged files under either spelling, and the model's own again after."""
    name, _, held, makers = small
    model = CASES[name].make()
    for names, prefix in ((makers, "diffusion_model"), (held, "transformer")):
        factors = random_pairs(names)
        adapter = write(tmp_path / "one.safetensors", as_diffusers({prefix: factors}))
        with lorafold.merge_into(model, [adapter]):
            now = dict(model.state_dict())
            assert different(makers_of(name, now) if names is makers else now, added(names, factors, 1.0)) == {}
        assert different(dict(model.state_dict()), held) == {}


def test_attention_to_a_picture_that_the_base_has_not(tmp_path):
    """Wan 2.2 lacks it, and adapters for 2.1 have it: the error says what it is, and how to leave it out."""
    held = dict(CASES["Wan"].make().state_dict())
    makers = makers_of("Wan", held)
    lacking = {name: t for name, t in makers.items() if "_img" not in name and "img_emb" not in name}
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"diffusion_model": random_pairs(makers)}))
    base = saved(tmp_path / "base.safetensors", lacking)
    refused(base, [adapter], UnmatchedAdapterError, "k_img", "picture", "allow_partial=True")
    lorafold.merge(base, [adapter], tmp_path / "out", allow_partial=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_a_fused_weight(tmp_path, axis):
    """A scale for each output splits by rows as the weight does; one for each input cannot, and is refused."""
    case = CASES["FLUX.1"]
    held = dict(case.make().state_dict())
    makers = makers_of("FLUX.1", held)
    tensors = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.adaLN_modulation.1", "img_in"):
        A, B = random_pairs({f"{name}.weight": makers[f"{name}.weight"]})[name]
        shape = (B.shape[0], 1) if axis == 0 else (1, A.shape[1])
        spelled = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{spelled}.lora_down.weight": A, f"{spelled}.lora_up.weight": B, f"{spelled}.alpha": torch.tensor(1.0)}
        tensors |= {f"{spelled}.dora_scale": torch.rand(shape) + 0.5}
    adapter = write(tmp_path / "one.safetensors", tensors)
    own = merged(saved(tmp_path / "makers.safetensors", makers), adapter, tmp_path / "own")
    assert len(different(own, makers)) == 4
    base = saved(tmp_path / "diffusers.safetensors", held)
    if axis:
        refused(base, [adapter], UnsupportedAdapterError, "double_blocks_0_img_attn_qkv", "each input", "fused")
    else:
        wanted = converted(case, own, {})
        assert different(merged(base, adapter, tmp_path / "other"), wanted) == {}


def test_dora_of_the_parts_of_a_fused_weight(tmp_path):
    """Each part has its own rows and norms; and one part alone leaves the others as they are."""
    case = CASES["FLUX.1"]
    held = dict(case.make().state_dict())
    makers = makers_of("FLUX.1", held)
    torch.manual_seed(1)
    for parts in (("to_q", "to_k", "to_v"), ("to_k",)):
        tensors = {}
        for name in (f"transformer_blocks.0.attn.{part}" for part in parts):
            A, B = random_pairs({f"{name}.weight": held[f"{name}.weight"]})[name]
            tensors |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
            tensors |= {f"transformer.{name}.lora_magnitude_vector": torch.rand(B.shape[0]) + 0.5}
        adapter = write(tmp_path / "one.safetensors", tensors)
        wanted = merged(saved(tmp_path / "diffusers.safetensors", held), adapter, tmp_path / "other")
        found = merged(saved(tmp_path / "makers.safetensors", makers), adapter, tmp_path / "own")
        assert len(different(wanted, held)) == len(parts)
        assert different(converted(case, found, {}), wanted) == {}


@pytest.mark.parametrize("prefix", ["conditioner.embedders.1.model.", "cond_stage_model.model.", ""])
def test_text_encoders_of_open_clip(tmp_path, prefix):
    """SDXL's second and SD 2's: one fused projection, and a square projection that is stored transposed."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    held, stored = open_clip()
    factors = random_pairs({name: tensor for name, tensor in held.items() if "embedding" not in name})
    part = "lora_te" if prefix.startswith("cond_stage") else "lora_te2"
    base = saved(tmp_path / "base.safetensors", stored, prefix)
    for body in ("text_model.", ""):
        names = {
            (name if name == "text_projection" else body + name.removeprefix("text_model.")): each for name, each in factors.items()
        }
        adapter = write(tmp_path / "one.safetensors", as_kohya({part: names}, alpha=1.0))
        found = merged(base, adapter, tmp_path / "out", prefix)
        wanted = added(held, factors, 0.5)
        assert torch.equal(found["text_projection"].T, wanted["text_projection.weight"])
        again = convert_open_clip_checkpoint(None, {prefix + name: tensor for name, tensor in found.items()}, prefix)
        assert wanted.keys() - again.keys() <= {"text_projection.weight"}  # diffusers leaves SD 2's out
        assert different(again, {name: tensor for name, tensor in wanted.items() if name in again}) == {}


def test_one_update_in_two_spellings_is_not_added_twice(tmp_path):
    """Some files of Z-Image hold an update fused and apart."""
    held = dict(CASES["Z-Image"].make().state_dict())
    makers = makers_of("Z-Image", held)
    names = [f"layers.0.attention.{part}" for part in ("to_q", "to_k", "to_v")]
    fused = random_pairs({"layers.0.attention.qkv.weight": makers["layers.0.attention.qkv.weight"]})
    factors = fused | random_pairs({f"{name}.weight": held[f"{name}.weight"] for name in names})
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"diffusion_model": factors}))
    for tensors in (held, makers):
        base = saved(tmp_path / "base.safetensors", tensors)
        refused(base, [adapter], PlanError, "changed twice")


def test_half_of_a_fused_weight_is_not_offered(tmp_path):
    held = dict(CASES["FLUX.1"].make().state_dict())
    del held["transformer_blocks.0.attn.to_v.weight"]
    assert "double_blocks.0.img_attn.qkv.weight" not in maker_slots({name: tuple(t.shape) for name, t in held.items()})


def test_every_line_of_the_table_can_be_read():
    for family in FAMILIES:
        lines = list(family.lines_for(["down_blocks.0.resnets.0.conv1.weight", "joint_blocks.3.x"]))
        rules = list(rules_of(lines))
        assert len({rule.maker for rule in rules}) == len(rules) > 5, family.name
        assert all("{" not in rule.maker + "".join(share.name for share in rule.shares) for rule in rules)
        assert all(rule.maker.count("*") == share.name.count("*") for rule in rules for share in rule.shares)

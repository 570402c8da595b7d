"""Differences of single tensors, and new ones, in files for image and video models: biases, norms, modulations, parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from diffusion import as_diffusers, write
from lorafold.errors import AdapterError, ShapeMismatchError, UnmatchedAdapterError
from makers import CASES, makers_of
from models import different, refused

Named = dict[str, Tensor]


@pytest.fixture(scope="module", params=["Wan", "FLUX.1"])
def bases(request, tmp_path_factory) -> tuple[str, dict[str, tuple[Path, Named]]]:
    path = tmp_path_factory.mktemp("bases")
    held = {name: tensor.clone().contiguous() for name, tensor in CASES[request.param].make().state_dict().items()}
    found = {}
    for side, tensors in (("diffusers", held), ("makers", makers_of(request.param, held))):
        save_file(tensors, path / f"{side}.safetensors")
        found[side] = (path / f"{side}.safetensors", tensors)
    return request.param, found


def merged(base: Path, adapter: Path, out: Path, weight: float = 1.0, **options: Any) -> Named:
    lorafold.merge(base, [(adapter, weight)], out, overwrite=True, **options)
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def plus(tensor: Tensor, update: Tensor, weight: float) -> Tensor:
    return (tensor.double() + weight * update.double()).to(tensor.dtype)


SINGLE = {
    "Wan": {  # the makers' tensor, and what an adapter has for it
        "blocks.0.self_attn.q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.1.modulation": "blocks.1.diff_m",
        "blocks.0.modulation": "blocks.0.modulation.diff",
        "head.modulation": "head.diff_m",
        "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
        "blocks.1.norm3.bias": "blocks.1.norm3.diff_b",
        "patch_embedding.weight": "patch_embedding.diff",
    },
    "FLUX.1": {
        "double_blocks.0.img_attn.qkv.bias": "double_blocks.0.img_attn.qkv.diff_b",
        "double_blocks.0.txt_attn.norm.query_norm.scale": "double_blocks.0.txt_attn.norm.query_norm.scale.diff",
        "single_blocks.0.linear1.bias": "single_blocks.0.linear1.diff_b",
        "final_layer.adaLN_modulation.1.bias": "final_layer.adaLN_modulation.1.diff_b",
        "single_blocks.0.norm.key_norm.scale": "single_blocks.0.norm.key_norm.scale.diff",
    },
}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "", "model.diffusion_model."])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_single_tensors_on_either_base(tmp_path, bases, prefix, weight):
    """A bias alone, a block's modulation, a norm, any parameter by its own name; and no other tensor changes."""
    name, both = bases
    base, held = both["makers"]
    torch.manual_seed(1)
    tensors = {f"{prefix}{spelled}": torch.randn(held[target].shape) for target, spelled in SINGLE[name].items()}
    adapter = write(tmp_path / "one.safetensors", tensors)
    wanted = held | {target: plus(held[target], tensors[f"{prefix}{spelled}"], weight) for target, spelled in SINGLE[name].items()}
    assert different(merged(base, adapter, tmp_path / "out", weight), wanted) == {}
    assert different(makers_of(name, merged(both["diffusers"][0], adapter, tmp_path / "two", weight)), wanted) == {}


def test_a_tensor_that_is_set(tmp_path, bases):
    """BFL's control adapters put norms in as they are: at any strength of the rest."""
    name, both = bases
    base, held = both["makers"]
    target, module = (
        ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in") if name == "FLUX.1" else ("blocks.0.norm3.weight", "head.head")
    )
    spelled = "blocks.0.norm3" if name == "Wan" else target
    new, weight = torch.randn(held[target].shape), held[f"{module}.weight"]
    A, B = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    tensors = as_diffusers({"diffusion_model": {module: (A, B)}}) | {f"diffusion_model.{spelled}.set_weight": new}
    adapter = write(tmp_path / "one.safetensors", tensors)
    wanted = held | {target: new, f"{module}.weight": plus(weight, B.double() @ A.double(), 0.5)}
    assert different(merged(base, adapter, tmp_path / "out", 0.5), wanted) == {}
    assert different(makers_of(name, merged(both["diffusers"][0], adapter, tmp_path / "two", 0.5)), wanted) == {}
    wrong = write(tmp_path / "wrong.safetensors", {f"diffusion_model.{spelled}.set_weight": torch.ones(3)})
    refused(base, [wrong], ShapeMismatchError, "set_weight", "[3]")
    lost = write(tmp_path / "lost.safetensors", {"diffusion_model.blocks.7.norm.set_weight": torch.ones(3)})
    refused(base, [lost], UnmatchedAdapterError, "blocks.7.norm")


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_a_bias_in_pefts_ending_without_its_configuration(tmp_path, bases, alpha):
    """It is a difference as it is: alpha, where there is one, is the pair's."""
    name, both = bases
    base, held = both["diffusers"]
    module = "transformer_blocks.0.attn.to_q" if name == "FLUX.1" else "blocks.0.attn1.to_q"
    weight, bias = held[f"{module}.weight"], held[f"{module}.bias"]
    torch.manual_seed(1)
    A, B, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), torch.randn(bias.shape)
    tensors = as_diffusers({"transformer": {module: (A, B)}}) | {f"transformer.{module}.lora_B.bias": b}
    if alpha is not None:
        tensors |= {f"transformer.{module}.alpha": torch.tensor(alpha)}
    adapter = write(tmp_path / "one.safetensors", tensors)
    update = B.double() @ A.double() * (1.0 if alpha is None else alpha / 2)
    wanted = held | {f"{module}.weight": plus(weight, update, 0.5), f"{module}.bias": plus(bias, b, 0.5)}
    assert different(merged(base, adapter, tmp_path / "out", 0.5), wanted) == {}
    found = merged(both["makers"][0], adapter, tmp_path / "two", 0.5)
    assert different(found, makers_of(name, wanted)) == {}


def test_what_does_not_go_together(tmp_path, bases):
    _, both = bases
    base, _ = both["makers"]
    for tensors, words in (
        ({"diffusion_model.x.alpha": torch.tensor(1.0), "diffusion_model.x.diff_b": torch.ones(4)}, "nothing to go with it"),
        ({"diffusion_model.x.diff_b": torch.ones(4).int()}, "I32"),
        ({"diffusion_model.x.diff_b": torch.ones(4, 4)}, "a vector"),
    ):
        refused(base, [write(tmp_path / "one.safetensors", tensors)], AdapterError, words)

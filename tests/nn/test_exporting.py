from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lorafold.errors import LayerError, NonFiniteError
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.rounding import Stochastic
from lorafold.nn import iter_merged, merged_state_dict
from lorafold.nn.attaching import attach
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.merging_layers import merge, unmerge


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 4)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])


def attached(dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Plain, Plain]:
    """A plain model, and its twin with trained LoRA layers."""
    plain = Plain().to(dtype)
    model = copy.deepcopy(plain)
    attach(model, ["emb", "conv", "layers.*"], r=2, lora_alpha=3, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return plain, model


@pytest.mark.parametrize("was_merged", [False, True])
@pytest.mark.parametrize("undo", ["copy", "compact"])
def test_the_merged_state_dict_loads_strictly_into_the_plain_model(undo: str, was_merged: bool) -> None:
    plain, model = attached(undo=undo)
    if was_merged:
        merge(model)
    before = copy.deepcopy(model.state_dict())
    exported = merged_state_dict(model)
    assert list(exported) == list(plain.state_dict())
    plain.load_state_dict(exported, strict=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merge(model)
    for name, module in (("conv", plain.conv), ("emb", plain.emb), ("layers.0", plain.layers[0])):
        assert torch.equal(module.weight, model.get_submodule(name).weight)


def test_only_what_adapters_touch_is_yielded_unless_told() -> None:
    _, model = attached()
    assert [name for name, _ in iter_merged(model)] == ["emb.weight", "conv.weight", "layers.0.weight", "layers.1.weight"]
    everything = [name for name, _ in iter_merged(model, untouched=True)]
    assert "norm.running_mean" in everything
    assert "conv.bias" in everything
    model.emb.set_active([])
    assert next(iter_merged(model))[0] == "conv.weight"


def test_the_models_own_weights_are_never_written() -> None:
    _, model = attached(torch.bfloat16)
    versions = {name: p._version for name, p in model.named_parameters()}
    pointers = {p.data_ptr() for p in model.parameters()}
    for name, tensor in iter_merged(model):
        assert tensor.data_ptr() not in pointers, name
        tensor.zero_()
    assert {name: p._version for name, p in model.named_parameters()} == versions


def test_merging_from_base_and_adapters_as_they_are_now() -> None:
    """An update made while the layers are merged is in what is yielded, though the weights do not have it yet."""
    _, model = attached(torch.bfloat16)
    merge(model)
    with torch.no_grad():
        model.layers[0].lora_A.mul_(3)
    yielded = dict(iter_merged(model))["layers.0.weight"]
    unmerge(model)
    merge(model)
    assert torch.equal(yielded, model.layers[0].weight)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_precision(precision: Any) -> None:
    _, model = attached()
    layer = model.layers[0]
    expected = merge_weight(layer.weight.detach(), layer.updates()[0].updates, precision=precision)
    assert torch.equal(dict(iter_merged(model, precision=precision))["layers.0.weight"], expected)


def test_stochastic_rounding_follows_seed_and_name() -> None:
    _, model = attached(torch.bfloat16)
    layer = model.layers[0]
    expected = merge_weight(layer.weight.detach(), layer.updates()[0].updates, rounding=Stochastic(7, "layers.0.weight"))
    one, again, other = (dict(iter_merged(model, rounding="stochastic", seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(one["layers.0.weight"], expected)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_stochastic_rounding_of_blocks_draws_as_for_the_whole() -> None:
    """Each block of a fused projection takes its random bits by its elements' places in the whole weight."""
    layer = MergedLinear(16, 32, r=2, enable_lora=[False, True], dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B, std=1e-3)
    nn.init.normal_(layer.lora_A, std=1e-1)
    got = dict(iter_merged(nn.Sequential(layer), rounding="stochastic", seed=3))["0.weight"]
    block = layer.updates()[0]
    rows = layer.weight.detach()[16:]
    assert torch.equal(got[:16], layer.weight[:16])
    assert torch.equal(got[16:], merge_weight(rows, block.updates, rounding=Stochastic(3, "0.weight", start=16 * 16)))


def test_all_is_checked_before_anything_is_yielded() -> None:
    _, model = attached()
    with torch.no_grad():
        model.layers[1].lora_A[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        iter_merged(model)
    tied = nn.ModuleDict({"emb": nn.Embedding(4, 4), "head": Linear(4, 4, r=2)})
    tied["head"].weight = tied["emb"].weight
    with pytest.raises(LayerError, match=r"is also emb\.weight"):
        merged_state_dict(tied)


def test_layers_built_as_such_and_the_root_have_plain_names_too() -> None:
    model = nn.Sequential(Conv2d(2, 3, 3, r=1), Embedding(4, 4, r=1))
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Embedding(4, 4))
    plain.load_state_dict(merged_state_dict(model), strict=True)
    nn.Linear(4, 2).load_state_dict(merged_state_dict(Linear(4, 2, r=1)), strict=True)


def test_a_compiled_models_names_are_plain() -> None:
    plain, model = attached()
    compiled = torch.compile(model)
    assert list(merged_state_dict(compiled)) == list(plain.state_dict())


def test_one_weight_of_memory_at_a_time() -> None:
    model = nn.Sequential(*[Linear(64, 64, r=1, bias=False) for _ in range(8)])
    alive = 0
    for _, tensor in iter_merged(model):
        alive = max(alive, tensor.untyped_storage().nbytes())
        del tensor
    assert alive == 64 * 64 * 4

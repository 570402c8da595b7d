"""State dicts: what they say of merging, and what loading one does to a layer in any state."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.errors import LayerError
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.lora_layer import LoRALayer
from lorafold.nn.layers.state_dict import tag_state_dict

KINDS: dict[str, Any] = {
    "linear": lambda: Linear(9, 7, r=3),
    "embedding": lambda: Embedding(9, 7, r=3),
    "merged": lambda: MergedLinear(9, 8, r=2, enable_lora=[True, False]),
    "conv": lambda: Conv2d(3, 4, 3, r=2),
}


def build(kind: str) -> nn.Sequential:
    layer = KINDS[kind]()
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return nn.Sequential(layer)


def weight(model: nn.Module) -> Tensor:
    layer: Any = model[0]  # type: ignore[index]
    return layer.weight.detach().clone()


def stored(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_dict_makes_a_merged_layer_whose_base_is_unknown(kind: str, mode: str, assign: bool) -> None:
    source, target = build(kind).eval(), getattr(build(kind), mode)()
    target.load_state_dict(stored(source.state_dict()), assign=assign)
    assert target[0].merged
    assert torch.equal(weight(target), weight(source))
    target.eval()
    assert torch.equal(weight(target), weight(source))
    with pytest.raises(LayerError, match="is not known"):
        target.train()
    assert torch.equal(weight(target), weight(source))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_whose_base_is_unknown_is_healed_by_its_base(kind: str) -> None:
    source, target = build(kind), build(kind)
    base = copy.deepcopy(source.state_dict())
    target.load_state_dict(source.eval().state_dict())
    adapter = {name: tensor for name, tensor in base.items() if "lora_" in name}
    with pytest.raises(LayerError, match="is not known"):
        target.load_state_dict(adapter, strict=False)  # onto which base?
    target.load_state_dict({name: tensor for name, tensor in base.items() if "lora_" not in name}, strict=False)
    assert torch.equal(weight(target), weight(source))
    target.train()
    assert torch.equal(weight(target), base[f"0.{source[0].weight_name}"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dict_with_nothing_for_a_layer_leaves_it_alone(kind: str) -> None:
    source, target = build(kind), build(kind)
    target.load_state_dict(source.eval().state_dict())
    target.load_state_dict({"other.weight": torch.zeros(1)}, strict=False)
    assert target[0].merged
    assert torch.equal(weight(target), weight(source))


@pytest.mark.parametrize("was_merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unmerged_dict_gives_its_base_and_adapter(kind: str, was_merged: bool) -> None:
    source, target = build(kind), build(kind)
    if was_merged:
        target.eval()
    target.load_state_dict(stored(source.state_dict()))
    assert target[0].merged is was_merged
    assert torch.equal(weight(target.eval()), weight(source.eval()))
    assert torch.equal(weight(target.train()), weight(source.train()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dict_without_metadata(kind: str) -> None:
    source, target = build(kind), build(kind)
    base = weight(target)
    bare = OrderedDict(source.state_dict().items())
    with pytest.raises(LayerError, match=r"tag_state_dict\(state_dict, merged=False\)") as caught:
        target.eval().load_state_dict(bare)
    assert "0." in caught.value.message
    assert target[0].merged
    assert torch.equal(weight(target.train()), base)

    target.load_state_dict(tag_state_dict(bare, merged=False))
    assert torch.equal(weight(target.eval()), weight(source.eval()))
    again = build(kind)
    again.load_state_dict(tag_state_dict(dict(source.state_dict()), merged=True))
    assert again[0].merged
    assert torch.equal(weight(again), weight(source))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dict_without_metadata_is_taken_where_it_cannot_be_misread(kind: str) -> None:
    source = build(kind)
    fresh = KINDS[kind]()  # its ΔW is zero: merged or not is the same
    build(kind)[0].load_state_dict(dict(fresh.state_dict()))
    target = copy.deepcopy(source)  # it has the very base of the dict
    with torch.no_grad():
        target[0].lora_B.zero_()
    target.eval().load_state_dict(dict(source.state_dict()))
    assert torch.equal(weight(target), weight(source.eval()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_that_does_not_fit_leaves_the_layer_whole(kind: str) -> None:
    model = build(kind).eval()
    merged, name = weight(model), f"0.{model[0].weight_name}"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({name: torch.zeros(1, 1)}, strict=False)
    assert torch.equal(weight(model), merged)
    lost = build(kind)
    lost.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        lost.load_state_dict({name: torch.zeros(1, 1)}, strict=False)
    assert lost[0].merged


def test_metadata_says_so_of_each_layer_and_through_wrappers() -> None:
    model = nn.ModuleDict({"a": Linear(4, 4, r=2), "plain": nn.Linear(4, 4), "b": nn.Sequential(Linear(4, 4, r=2))})
    model["a"].eval()
    metadata: Any = model.state_dict()._metadata  # type: ignore[attr-defined]
    assert (metadata["a"]["lora_merged"], metadata["b.0"]["lora_merged"]) == (True, False)
    assert "lora_merged" not in metadata["plain"]


def test_a_tag_reaches_named_adapters_and_the_root() -> None:
    tagged: Any = tag_state_dict({"x.lora_adapters.s.lora_A": 0, "lora_A": 0, "y.weight": 0}, merged=True)
    assert dict(tagged._metadata) == {"x": {"lora_merged": True}, "": {"lora_merged": True}}


def test_a_layer_without_adapters_is_never_merged_in_a_state_dict() -> None:
    for build in (lambda: Linear(4, 4), lambda: MergedLinear(4, 4, r=2)):
        target = nn.Sequential(build())
        target.load_state_dict(nn.Sequential(build()).eval().state_dict())
        target.train()
        target.eval()


def test_both_layouts_of_convolutions_load() -> None:
    plain = nn.Conv2d(3, 4, 3)
    newer = {"weight": plain.weight, "bias": plain.bias, "conv.weight": plain.weight, "conv.bias": plain.bias}
    for state_dict in (plain.state_dict(), newer):
        layer = Conv2d(3, 4, 3)
        layer.load_state_dict(state_dict)
        assert torch.equal(layer.conv.weight, plain.weight)
        assert torch.equal(layer.bias, plain.bias)


class OldStyle(nn.Linear, LoRALayer):
    """A layer as loralib's users write them."""

    def __init__(self) -> None:
        nn.Linear.__init__(self, 4, 4)
        LoRALayer.__init__(self, r=2, lora_alpha=1, lora_dropout=0.0, merge_weights=True)
        self.lora_A = nn.Parameter(torch.ones(2, 4))
        self.lora_B = nn.Parameter(torch.ones(4, 2))


def test_layers_of_ones_own_work_as_before() -> None:
    layer = OldStyle()
    assert layer(torch.ones(1, 4)).shape == (1, 4)
    assert not layer.merged
    layer.load_state_dict(layer.state_dict())

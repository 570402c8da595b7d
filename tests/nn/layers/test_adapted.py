"""Several adapters on one layer: each with its own rank and scaling, summed with one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafold.errors import LayerError, NonFiniteError
from lorafold.kernel.merge import merge_weight
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.mergeable import Mergeable

LAYERS = {
    "linear": (lambda: Linear(9, 8, r=3), torch.randn(4, 9)),
    "merged": (lambda: MergedLinear(9, 8, r=3, enable_lora=[False, True]), torch.randn(4, 9)),
    "embedding": (lambda: Embedding(9, 8, r=3), torch.randint(0, 9, (4,))),
    "conv": (lambda: Conv2d(3, 4, 3, r=2), torch.randn(2, 3, 5, 5)),
}


def two(kind: str) -> tuple[Mergeable, Tensor]:
    build, x = LAYERS[kind]
    layer = build()
    layer.add_adapter("style", r=1, lora_alpha=3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return layer, x


@pytest.mark.parametrize("kind", LAYERS)
def test_the_active_ones_are_summed(kind: str) -> None:
    layer, x = two(kind)
    outputs = {}
    for active in ((), ("default",), ("style",), ("default", "style")):
        layer.set_active(active)
        outputs[active] = layer(x)
    base = outputs[()]
    both = base + (outputs["default",] - base) + (outputs["style",] - base)
    torch.testing.assert_close(outputs["default", "style"], both, rtol=1e-4, atol=1e-5)  # float32, sums of some tens
    assert not torch.equal(outputs["style",], base)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_of_the_active_ones_while_merged_equals_a_fresh_merge(kind: str) -> None:
    layer, _ = two(kind)
    base = layer.weight.detach().clone()
    layer.set_active(["style"])
    layer.merge()
    fresh = layer.weight.detach().clone()
    layer.unmerge()
    layer.set_active(["default"])
    layer.merge()
    layer.set_active(["style"])
    assert layer.merged
    assert torch.equal(layer.weight, fresh)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_they_are_merged_in_one_rounding_whatever_their_order() -> None:
    layer, _ = two("linear")
    layer.to(torch.bfloat16)
    updates = [update for name in ("default", "style") for update in layer.updates([name])[0].updates]
    expected = merge_weight(layer.weight.detach(), updates)
    for order in (["default", "style"], ["style", "default"]):
        layer.unmerge()
        layer.set_active(order)
        layer.merge()
        assert torch.equal(layer.weight, expected)


def test_a_named_adapter_trains_and_is_in_the_state_dict() -> None:
    layer, x = two("linear")
    layer.set_active(["style"])
    layer(x).sum().backward()
    assert layer.lora_adapters["style"].lora_A.grad is not None  # type: ignore[union-attr]
    assert layer.lora_A.grad is None
    assert "lora_adapters.style.lora_B" in layer.state_dict()
    assert layer.lora_adapters["style"].scaling == 3.0


def test_names_are_checked() -> None:
    layer, _ = two("linear")
    for name in ("style", "default", "", "a.b", "keys"):
        with pytest.raises(LayerError):
            layer.add_adapter(name, r=1)
    for names in (["nobody"], ["style", "style"]):
        with pytest.raises(LayerError, match="must be chosen from"):
            layer.set_active(names)
    layer.set_active(["style"])
    with pytest.raises(LayerError, match="is active"):
        layer.remove_adapter("style")
    layer.set_active(["default"])
    layer.remove_adapter("style")
    with pytest.raises(LayerError, match="no named adapter"):
        layer.remove_adapter("style")
    assert layer.adapter_names == ["default"]


def test_a_layer_that_takes_no_update_is_said_so() -> None:
    with pytest.raises(LayerError, match="no parameters"):
        MergedLinear(4, 4).add_adapter("style", r=1)
    with pytest.raises(LayerError, match="no parameters"):
        Linear(4, 4).add_adapter("style", r=0)


def test_a_plain_layer_takes_a_named_adapter() -> None:
    layer = Linear(4, 3)
    layer.add_adapter("style", r=2)
    layer.set_active(["style"])
    nn.init.normal_(layer.lora_adapters["style"].lora_B)  # type: ignore[union-attr,arg-type]
    base = layer.weight.detach().clone()
    assert not torch.equal(layer.eval().weight, base)
    assert torch.equal(layer.train().weight, base)


def test_switching_to_an_adapter_that_is_not_finite_changes_nothing() -> None:
    layer, _ = two("linear")
    layer.merge()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.lora_adapters["style"].lora_A[0, 0] = torch.nan  # type: ignore[union-attr,operator]
    with pytest.raises(NonFiniteError, match="'style'"):
        layer.set_active(["style"])
    assert torch.equal(layer.weight, before)
    assert layer.active_adapters == ("default",)


def test_new_factors_take_the_place_of_the_own_ones() -> None:
    layer, _ = two("linear")
    base = layer.weight.detach().clone()
    layer.merge()
    lora_A, lora_B = torch.randn(5, 9), torch.randn(8, 5)
    layer.take_factors(lora_A, lora_B, r=5, lora_alpha=10, lora_dropout=0.0, scaling=2.0)
    expected = merge_weight(base, list(layer.updates()[0].updates))
    assert torch.equal(layer.weight, expected)
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    with pytest.raises(LayerError, match="of rank 4 must be"):
        layer.take_factors(lora_A, lora_B, r=4, lora_alpha=10, lora_dropout=0.0, scaling=2.0)

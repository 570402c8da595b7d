"""`model.eval()` merges all layers or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafold.errors import NonFiniteError
from lorafold.nn.layers.linear import Linear
from lorafold.nn.layers.ownership import model_in_train


def build() -> nn.Sequential:
    return nn.Sequential(Linear(4, 4, r=2), nn.Sequential(Linear(4, 4, r=2), nn.ReLU()), Linear(4, 4, r=2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_stops_the_last_layer_stops_the_first(value: float) -> None:
    model = build()
    nn.init.constant_(model[0].lora_B, 0.5)
    base = model[0].weight.detach().clone()
    with torch.no_grad():
        model[2].lora_A[1, 1] = value
    with pytest.raises(NonFiniteError, match=r"^2: lora_A of the adapter 'default' holds NaN or infinity"):
        model.eval()
    assert not any(layer.merged for layer in (model[0], model[1][0], model[2]))
    assert torch.equal(model[0].weight, base)


def test_a_layer_that_is_not_merged_by_eval_does_not_stop_it() -> None:
    model = build()
    model[2].merge_weights = False
    with torch.no_grad():
        model[2].lora_A[1, 1] = torch.nan
    model.eval()
    assert [model[0].merged, model[1][0].merged, model[2].merged] == [True, True, False]


def test_after_a_layer_was_merged_by_itself_the_others_are_checked_one_by_one() -> None:
    model = build()
    model[0].merge()
    with torch.no_grad():
        model[1][0].lora_A[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^1\.0: lora_A"):
        model.eval()
    assert not model[1][0].merged


def test_large_finite_numbers_are_finite() -> None:
    layer = Linear(4, 4, r=2, dtype=torch.float64)
    nn.init.constant_(layer.lora_A, 1.7e308)
    layer.check_finite(["default"])


def test_the_model_in_train_is_the_outermost() -> None:
    seen = []

    class Spy(nn.Module):
        def train(self, mode: bool = True) -> Spy:
            seen.append(model_in_train())
            return super().train(mode)

    model = nn.Sequential(nn.Sequential(Spy()))
    model.eval()
    assert seen == [model]
    assert model_in_train() is None

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorafold.errors import LayerError
from lorafold.nn.layers.linear import Linear
from lorafold.nn.layers.ownership import sharers


class Tied(nn.Module):
    def __init__(self, *, by_data: bool = False) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.inner = nn.Sequential(Linear(4, 6, r=2, bias=False))
        if by_data:
            self.inner[0].weight.data = self.emb.weight.data
        else:
            self.inner[0].weight = self.emb.weight


@pytest.mark.parametrize("by_data", [False, True])
def test_sharing_is_seen_by_parameter_and_by_memory(by_data: bool) -> None:
    model = Tied(by_data=by_data)
    layer = model.inner[0]
    assert sharers(layer.weight, layer, model) == ["emb.weight"]
    with pytest.raises(LayerError, match=r"the weight of inner\.0 is also emb\.weight") as caught:
        model.eval()
    assert "untie" in str(caught.value)
    assert not layer.merged


def test_a_shared_module_is_not_a_shared_weight() -> None:
    layer = Linear(4, 4, r=2)
    model = nn.ModuleDict({"one": layer, "two": layer})
    assert model.eval()["one"].merged


def test_without_merging_sharing_is_fine() -> None:
    model = Tied()
    model.inner[0].merge_weights = False
    before = model.emb.weight.detach().clone()
    model.eval()
    assert torch.equal(model.emb.weight, before)


def test_a_layer_without_adapters_is_not_merged_and_may_share() -> None:
    model = nn.Module()
    model.emb, model.head = nn.Embedding(6, 4), Linear(4, 6, bias=False)
    model.head.weight = model.emb.weight
    model.eval()


def test_weights_without_memory_share_nothing() -> None:
    one, two = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")
    assert sharers(one.weight, one, nn.Sequential(one, two)) == []

"""Weights that are computed from others, hold other numbers than they stand for, or overlap with others: refused, and by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lorafold.errors import LayerError
from lorafold.nn import attach, iter_merged, merge, unmerge
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear
from lorafold.nn.layers.ownership import overlap

COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "parametrization": (lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()), "parametrization Identity"),
    "weight norm": (parametrizations.weight_norm, "parametrization _WeightNorm"),
    "spectral norm": (parametrizations.spectral_norm, "parametrization _SpectralNorm"),
    "orthogonal": (parametrizations.orthogonal, "parametrization _Orthogonal"),
    "old weight norm": (nn.utils.weight_norm, r"computed from weight_g, weight_v.*remove_weight_norm"),
    "old spectral norm": (nn.utils.spectral_norm, r"computed from weight_orig, .*remove_spectral_norm"),
    "pruned": (lambda m: prune.random_unstructured(m, "weight", 0.5), r"computed from weight_mask, weight_orig.*prune\.remove"),
    "int8": (lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().to(torch.int8), requires_grad=False)), "torch.int8"),
    "float8": (
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)),
        "torch.float8_e4m3fn",
    ),
    "subclass": (lambda m: setattr(m, "weight", Params4bit(m.weight.detach())), "Params4bit, not a plain parameter"),
}


class Params4bit(nn.Parameter):
    """As bitsandbytes has its weights: a parameter of a type of its own."""

    def __new__(cls, data: Tensor) -> Params4bit:
        return torch.Tensor._make_subclass(cls, data)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("kind", COMPUTED)
def test_what_is_no_plain_parameter_is_refused_when_attached(kind: str) -> None:
    change, words = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[1])
    before = [type(module) for module in model.modules()]
    for targets in ("all-linear", ["1"]):
        with pytest.raises(LayerError, match=rf"(?s)the weight of 1 is .*{words}"):
            attach(model, targets, r=2)
    assert [type(module) for module in model.modules()] == before
    assert attach(model, ["0"], r=2) == ["0"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("kind", COMPUTED)
def test_and_when_merged_where_it_became_so_later(kind: str) -> None:
    change, words = COMPUTED[kind]
    model = nn.Sequential(Linear(8, 8, r=2), Linear(8, 8, r=2))
    nn.init.normal_(model[0].lora_B)
    first = model[0].weight.detach().clone()
    change(model[1])
    for verb in (nn.Module.eval, merge, lambda m: list(iter_merged(m))):
        with pytest.raises(LayerError, match=rf"(?s)the weight of .* is .*{words}"):
            verb(model)
    assert not model[0].merged  # all or none
    assert torch.equal(model[0].weight, first)
    assert not model[1].merged


def test_a_merged_layer_that_is_parametrized_meanwhile_cannot_be_unmerged_in_silence() -> None:
    layer = Linear(8, 8, r=2)
    nn.init.normal_(layer.lora_B)
    base = layer.weight.detach().clone()
    layer.eval()
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    for verb in (Linear.train, unmerge):
        with pytest.raises(LayerError, match="parametrization Identity"):
            verb(layer)
    assert layer.merged
    parametrize.remove_parametrizations(layer, "weight")
    layer.train()
    assert torch.equal(layer.weight, base)


def views(layer: nn.Module) -> dict[str, Callable[[], None]]:
    """Ways in which another tensor of a model may have elements of the layer's weight."""
    weight = layer.weight.detach()
    flat = weight.view(-1)
    return {
        "the tail, as a parameter": lambda: setattr(layer.other, "p", nn.Parameter(flat[-3:])),
        "a column": lambda: setattr(layer.other, "p", nn.Parameter(weight.select(-1, 1))),
        "a buffer": lambda: layer.other.register_buffer("b", flat[2:5]),
        "a buffer that is not saved": lambda: layer.other.register_buffer("b", weight, persistent=False),
        "the bits, as integers": lambda: layer.other.register_buffer("b", flat[4:].view(torch.int32)),
        "the bytes, as the layer's own buffer": lambda: layer.register_buffer("b", flat.view(torch.uint8)),
    }


@pytest.mark.parametrize("way", list(views(nn.Linear(2, 2))))
@pytest.mark.parametrize("build", [lambda: Linear(4, 4, r=2), lambda: Embedding(5, 4, r=2), lambda: Conv2d(2, 2, 2, r=1)])
def test_any_view_of_the_weight_is_found(build: Callable[[], Any], way: str) -> None:
    layer = build()
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer.other = nn.Module()
    layer.eval()
    layer.train()  # without the view it merges
    views(layer)[way]()
    before = layer.weight.detach().clone()
    with pytest.raises(LayerError, match=r"is also (other\.)?[pb]: merging into it would change both"):
        layer.eval()
    assert torch.equal(layer.weight, before)


def test_neighbours_in_one_memory_are_no_overlap() -> None:
    whole = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(3, 8), nn.Linear(3, 8))
    for i, part in enumerate((whole[:4], whole[4:])):
        model[i].weight = nn.Parameter(part)
    columns = torch.randn(8, 6)
    for i, part in enumerate((columns[:, :3], columns[:, 3:])):
        model[2 + i].weight = nn.Parameter(part)
    attach(model, "all-linear", r=1)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    before = [layer.weight.detach().clone() for layer in model]
    model.eval()
    assert not any(torch.equal(layer.weight, b) for layer, b in zip(model, before, strict=True))
    model.train()
    assert all(torch.equal(layer.weight, b) for layer, b in zip(model, before, strict=True))


part = st.tuples(st.integers(0, 11), st.integers(0, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3))


@given(one=part, other=part, narrow=st.booleans())
def test_overlap_is_what_writing_shows(one: Any, other: Any, narrow: bool) -> None:
    """Two views of any offset and strides, one of them perhaps of bytes, have a byte in common exactly if writing to one is seen in
    the other."""
    whole = torch.zeros(64, dtype=torch.int32)
    first, second = (whole.as_strided((rows, columns), (row, step), start) for start, row, step, columns, rows in (one, other))
    if narrow:
        second = whole.view(torch.uint8)[other[0] :].as_strided((other[4],), (other[2],), other[0])
    first.fill_(-1)
    assert overlap(first, second) == overlap(second, first) == bool(second.any())

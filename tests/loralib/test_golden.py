"""The layers against what the real loralib 0.1.2 did (`make_golden`), bit for bit."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import loralib as lora
from lorafold.nn.layers.state_dict import tag_state_dict

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden.json").read_text())
TENSORS = load_file(HERE / "golden.safetensors")
CASES = GOLDEN["cases"]


def built(name: str, **more: Any) -> nn.Module:
    case = CASES[name]
    return getattr(lora, case["class"])(*case["args"], **case["kwargs"], **more)


def golden(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name): tensor for key, tensor in TENSORS.items() if key.startswith(name)}


def filled(name: str, **more: Any) -> nn.Module:
    layer = built(name, **more)
    layer.load_state_dict(tag_state_dict(golden(f"{name}.filled."), merged=False))
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    return layer.weight.detach()


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_layer(name: str) -> None:
    torch.manual_seed(GOLDEN["seed"])
    layer = built(name)
    assert torch.equal(torch.rand(4), golden(f"{name}.")["next"])  # as many random numbers drawn, in the same order
    fresh = golden(f"{name}.fresh.")
    assert {key: list(tensor.shape) for key, tensor in layer.state_dict().items()} == CASES[name]["shapes"]
    for key, tensor in layer.state_dict().items():
        # uniform numbers come from integers by exact steps; normal ones from log and cos, whose last bits differ among machines
        normal = CASES[name]["class"] == "Embedding"
        torch.testing.assert_close(tensor, fresh[key], rtol=0, atol=2**-20 if normal else 0)


@pytest.mark.parametrize("name", CASES)
def test_attributes_and_frozen_parameters(name: str) -> None:
    layer = built(name)
    layer.eval()
    assert {key: getattr(layer, key) for key in CASES[name]["attributes"]} == CASES[name]["attributes"]
    assert {key: p.requires_grad for key, p in layer.named_parameters()} == CASES[name]["requires_grad"]


@pytest.mark.parametrize("name", CASES)
def test_unmerged_forward_and_gradients(name: str) -> None:
    layer, given = filled(name), golden(f"{name}.")
    x = given["x"]
    if x.is_floating_point():
        x.requires_grad_()
    y = layer(x)
    assert torch.equal(y, given["y"])
    (y * given["upstream"]).sum().backward()
    gradients = {key: p.grad for key, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}
    expected = golden(f"{name}.grad.")
    assert {key for key, g in gradients.items() if g is not None} == set(expected)
    for key, gradient in expected.items():
        assert torch.equal(gradients[key], gradient), key


@pytest.mark.parametrize("undo", ["copy", "copy-cpu", "compact"])
@pytest.mark.parametrize("name", CASES)
def test_eval_merges_and_train_restores(name: str, undo: str) -> None:
    layer, given = filled(name, undo=undo), golden(f"{name}.")
    base = weight_of(layer).clone()
    assert layer.eval() is layer
    assert torch.equal(weight_of(layer), given["merged"])
    assert torch.equal(layer(given["x"]), given["y"])
    assert layer.train() is layer
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("name", GOLDEN["signatures"])
def test_signatures_begin_with_loralibs(name: str) -> None:
    found = getattr(lora, name)
    function = found.__init__ if inspect.isclass(found) else found
    own = [[p.name, p.kind.name, repr(p.default)] for p in inspect.signature(function).parameters.values()]
    keyword_only = [p for p in own if p[1] == "KEYWORD_ONLY"]
    assert [p for p in own if p not in keyword_only] == GOLDEN["signatures"][name]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_functions_on_models(bias: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), lora.Linear(4, 4, r=2), lora.MergedLinear(4, 6, r=1, enable_lora=[True, False]), lora.Linear(6, 2)
    )
    lora.mark_only_lora_as_trainable(model, bias=bias)
    expected = GOLDEN["functions"][bias]
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == expected["trainable"]
    # loralib trains the bias of a layer of rank 0 under "lora_only", and then does not save it
    extra = {"3.bias"} if bias == "lora_only" else set()
    assert set(lora.lora_state_dict(model, bias=bias)) == set(expected["state_dict"]) | extra

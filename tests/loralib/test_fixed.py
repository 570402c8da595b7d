"""What loralib 0.1.2 gets wrong, one test each, written against the interface that both have.

Every test here fails on the real loralib; to see it, put that into a folder and run this file with the folder first on the path::

    pip install --no-deps --target /tmp/loralib-0.1.2 loralib==0.1.2
    PYTHONPATH=/tmp/loralib-0.1.2 pytest tests/loralib/test_fixed.py
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

import loralib as lora

KINDS: dict[str, Any] = {
    "linear": lambda **kw: lora.Linear(24, 16, r=4, lora_alpha=8, **kw),
    "embedding": lambda **kw: lora.Embedding(24, 16, r=4, lora_alpha=8, **kw),
    "merged": lambda **kw: lora.MergedLinear(24, 32, r=4, lora_alpha=8, enable_lora=[True, False], **kw),
    "conv2d": lambda **kw: lora.Conv2d(4, 6, 3, r=2, lora_alpha=4, **kw),
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def trained(layer: nn.Module, scale: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=scale)
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    return (layer.conv if hasattr(layer, "conv") else layer).weight.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_eval_return_the_layer(kind: str) -> None:
    layer = KINDS[kind]()
    assert layer.eval() is layer
    assert layer.train() is layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = trained(KINDS[kind](dtype=dtype))
    base = weight_of(layer).clone()
    for _ in range(20):
        layer.eval()
        layer.train()
        trained(layer)
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("change", ["factors", "scaling", "merge_weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back_whatever_changed_while_merged(kind: str, change: str) -> None:
    layer = trained(KINDS[kind]())
    base = weight_of(layer).clone()
    layer.eval()
    if change == "factors":
        trained(layer, scale=3.0)
    elif change == "scaling":
        layer.scaling = 100.0
    else:
        layer.merge_weights = False
    layer.train()
    assert torch.equal(weight_of(layer), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_merge_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = trained(lora.Linear(64, 64, r=4, lora_alpha=8, dtype=dtype))
    delta = layer.lora_B.double() @ layer.lora_A.double() * layer.scaling
    exact = weight_of(layer).double() + delta
    layer.eval()
    # one rounding is within half a step; float32 accumulation adds at most 2⁻²⁰ of the terms' size, far below a step
    half_step = (exact.abs() * torch.finfo(dtype).eps / 2).clamp(min=torch.finfo(dtype).smallest_normal)
    assert ((weight_of(layer).double() - exact).abs() <= half_step * (1 + 2**-6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_state_dict_is_not_merged_twice(kind: str) -> None:
    model = nn.Sequential(trained(KINDS[kind]()))
    model.eval()
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    fresh = nn.Sequential(KINDS[kind]())
    fresh.load_state_dict(torch.load(stored))
    fresh.eval()
    assert torch.equal(weight_of(fresh[0]), weight_of(model[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_state_dict_that_lost_its_metadata_is_refused(kind: str) -> None:
    layer = trained(KINDS[kind]())
    layer.eval()
    without = dict(layer.state_dict())
    with pytest.raises(ValueError, match="does not say whether"):
        KINDS[kind]().load_state_dict(without)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loaded_while_merged_takes_effect_and_leaves_the_base(kind: str) -> None:
    layer, other = trained(KINDS[kind]()), trained(KINDS[kind]())
    base = weight_of(layer).clone()
    adapter = lora.lora_state_dict(other)
    layer.eval()
    layer.load_state_dict(adapter, strict=False)
    merged = weight_of(layer).clone()
    layer.train()
    assert torch.equal(weight_of(layer), base)
    layer.eval()
    assert torch.equal(weight_of(layer), merged)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_loaded_while_merged_is_the_base(kind: str) -> None:
    layer, other = trained(KINDS[kind]()), KINDS[kind]()
    new_base = {name: tensor for name, tensor in other.state_dict().items() if "lora_" not in name}
    layer.eval()
    layer.load_state_dict(new_base, strict=False)
    layer.train()
    assert torch.equal(weight_of(layer), weight_of(other))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(24, 16)
        self.head = lora.Linear(16, 24, r=4, bias=False)
        self.head.weight = self.emb.weight


def test_a_tied_weight_is_not_merged_into() -> None:
    model = Tied()
    trained(model)
    before = model.emb.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight of head is also emb\.weight"):
        model.eval()
    assert torch.equal(model.emb.weight, before)


@pytest.mark.parametrize("conv", ["Conv1d", "Conv3d"])
def test_conv1d_and_conv3d_with_larger_kernels(conv: str) -> None:
    layer = trained(getattr(lora, conv)(4, 6, 3, r=2))
    x = torch.randn(2, 4, *[5] * len(layer.conv.kernel_size))
    y = layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)  # two float32 convolutions of some 100 terms


def test_conv_kernels_may_be_tuples() -> None:
    layer = trained(lora.Conv2d(4, 6, (3, 5), r=2))
    assert layer(torch.randn(1, 4, 7, 7)).shape == (1, 6, 5, 3)


def test_a_conv_drops_out() -> None:
    layer = trained(lora.Conv2d(4, 6, 3, r=2, lora_dropout=1.0))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), layer.conv(x))  # everything that goes into lora_A is dropped


def test_a_conv_registers_its_weight_once_and_loads_plain_names() -> None:
    layer = lora.Conv2d(4, 6, 3, r=2)
    plain = nn.Conv2d(4, 6, 3)
    assert [name for name in layer.state_dict() if name.endswith("weight")] == ["conv.weight"]
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["lora_A", "lora_B"], [])
    assert torch.equal(layer.conv.weight, plain.weight)
    assert torch.equal(layer.conv.bias, plain.bias)


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_fan_in_fan_out_is_stored_contiguous(kind: str) -> None:
    more = {"enable_lora": [True, True]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(6, 8, r=2, fan_in_fan_out=True, **more)
    assert layer.weight.is_contiguous()
    to_safetensors(layer.state_dict())


def test_merged_linear_with_nothing_enabled_is_a_plain_linear() -> None:
    layer = lora.MergedLinear(6, 8, r=2)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_merged_linears_index_moves_along() -> None:
    layer = lora.MergedLinear(6, 8, r=2, enable_lora=[True, False])
    assert layer.to("meta").lora_ind.device.type == "meta"
    assert "lora_ind" not in layer.state_dict()


@pytest.mark.parametrize("kind", ["linear", "merged", "conv2d"])
def test_a_bfloat16_base_with_float32_factors(kind: str) -> None:
    layer = trained(KINDS[kind](dtype=torch.bfloat16))
    for name in ("lora_A", "lora_B"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.float()
    y = layer(torch.randn((2, 4, 5, 5) if kind == "conv2d" else (2, 24), dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_dropout_can_be_pickled(kind: str) -> None:
    layer = trained(KINDS[kind]())
    assert torch.equal(pickle.loads(pickle.dumps(layer)).lora_A, layer.lora_A)


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="r must be an integer, 0 or more, not -1"):
        lora.Linear(4, 4, r=-1)


def test_only_adapters_are_marked_as_trainable_not_names_like_theirs() -> None:
    model = nn.ModuleDict({"lora_free_head": nn.Linear(4, 4), "fc": lora.Linear(4, 4, r=2)})
    lora.mark_only_lora_as_trainable(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["fc.lora_A", "fc.lora_B"]
    assert sorted(lora.lora_state_dict(model)) == ["fc.lora_A", "fc.lora_B"]


def test_max_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        lora.Embedding(10, 4, r=2, max_norm=1.0)

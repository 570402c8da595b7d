"""The forward pass of each type, against dense oracles, and under autocast, compilation and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafold.errors import LayerError
from lorafold.nn.layers.conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.mergeable import Mergeable

BUILD: dict[str, Callable[..., Mergeable]] = {
    "linear": lambda **kw: Linear(9, 8, r=3, lora_alpha=6, **kw),
    "merged": lambda **kw: MergedLinear(9, 8, r=3, lora_alpha=6, enable_lora=[True, False], **kw),
    "embedding": lambda **kw: Embedding(9, 8, r=3, lora_alpha=6, **kw),
    "conv": lambda **kw: Conv2d(3, 4, 3, r=2, lora_alpha=4, **kw),
}


def build(kind: str, **kw: Any) -> Mergeable:
    return trained(BUILD[kind](**kw))


def trained(layer: Mergeable) -> Mergeable:
    with torch.no_grad():
        layer.lora_A.normal_(std=0.5)
        layer.lora_B.normal_(std=0.5)
    return layer


def example(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "embedding":
        return torch.randint(0, 9, (4, 3))
    return torch.randn((2, 3, 6, 6) if kind == "conv" else (4, 3, 9), dtype=dtype)


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)])
@pytest.mark.parametrize("kind", ["linear", "merged"])
def test_inputs_of_any_number_of_dimensions(kind: str, shape: tuple[int, ...]) -> None:
    layer = build(kind, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], 8)
    # float64: sums of nine and of three terms, in another order
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-13, atol=1e-14)


CONVS = [
    (Conv1d, (4, 6, 3), {}),
    (Conv1d, (4, 6, 5), {"groups": 2, "stride": 2, "padding": 3, "dilation": 2}),
    (Conv1d, (4, 6, (1,)), {"padding_mode": "circular", "padding": 1}),
    (Conv2d, (4, 6, 3), {"groups": 2, "padding": "same"}),
    (Conv2d, (4, 6, (1, 3)), {"stride": (2, 1), "padding_mode": "reflect", "padding": 1}),
    (Conv2d, (4, 8, (3, 2)), {"groups": 4, "bias": False, "dilation": 2}),
    (Conv3d, (4, 6, 2), {"groups": 2}),
    (Conv3d, (4, 6, (1, 2, 3)), {"padding": 1}),
]


@pytest.mark.parametrize(("kind", "args", "kwargs"), CONVS)
def test_convolutions_of_every_kernel(kind: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Unmerged and merged equal torch's convolution with W + (B @ A).view(W.shape) · scaling, gradients too."""
    layer: Any = trained(kind(*args, r=2, lora_alpha=3, dtype=torch.float64, **kwargs))
    plain = type(layer.conv)(*args, dtype=torch.float64, **kwargs)
    delta = (layer.lora_B @ layer.lora_A).view(layer.weight.shape) * 1.5
    with torch.no_grad():
        plain.weight.copy_(layer.weight + delta)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    x = torch.randn(2, 4, *[7] * len(layer.conv.kernel_size), dtype=torch.float64)
    y, expected = layer(x), plain(x)
    # float64: two sums of at most 4 · 25 terms
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert layer.lora_A.grad is not None
    torch.testing.assert_close(
        layer.lora_B.grad, plain.weight.grad.view(layer.lora_B.shape[0], -1) @ layer.lora_A.T * 1.5, rtol=1e-11, atol=1e-12
    )
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-12, atol=1e-13)


def test_a_transposed_convolution_is_refused() -> None:
    with pytest.raises(LayerError, match="not transposed"):
        ConvLoRA(nn.ConvTranspose2d, 4, 4, 3, r=2)


@pytest.mark.parametrize("kind", ["linear", "merged", "conv"])
def test_dropout_acts_on_what_goes_into_the_update_in_training_only(kind: str) -> None:
    layer = build(kind, lora_dropout=0.5, merge_weights=False, dtype=torch.float64)
    x = example(kind, torch.float64)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x if kind == "conv" else x.reshape(-1, 9), 0.5).view(x.shape)
    layer.eval()
    update_of_dropped = layer(dropped)
    assert torch.equal(update_of_dropped, layer(dropped))
    layer.set_active([])
    # float64: sums of at most 27 terms, in another order
    torch.testing.assert_close(y, layer(x) + update_of_dropped - layer(dropped), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BUILD)
def test_half_precision_base_with_float32_factors(kind: str, dtype: torch.dtype) -> None:
    layer = build(kind, dtype=dtype)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = example(kind, dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
    exact = build_like(layer, kind)(x if kind == "embedding" else x.double())
    # a rounding of W x, of the input to each factor, and of the sum, each of at most half a step of the largest number
    assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def build_like(layer: Mergeable, kind: str) -> Mergeable:
    twin = build(kind, dtype=torch.float64)
    twin.load_state_dict({name: tensor.double() for name, tensor in layer.state_dict().items() if "lora" not in name}, strict=False)
    twin.lora_A.data, twin.lora_B.data = layer.lora_A.data.double(), layer.lora_B.data.double()
    return twin


@pytest.mark.parametrize("kind", BUILD)
def test_autocast_gives_the_dtype_of_the_plain_layer(kind: str) -> None:
    layer = build(kind)
    x = example(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = layer(x)
        merged = layer.eval()(x)
    assert unmerged.dtype == merged.dtype
    # bfloat16 has eight bits; a few roundings of intermediate numbers
    assert (unmerged - merged).abs().max() <= 8 * 2**-8 * merged.abs().max()


@pytest.mark.parametrize("kind", BUILD)
def test_gradient_checkpointing(kind: str) -> None:
    layer = build(kind)
    x = example(kind)
    layer(x).square().sum().backward()
    expected = layer.lora_A.grad, layer.lora_B.grad
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, expected[0])
    assert torch.equal(layer.lora_B.grad, expected[1])


@pytest.mark.parametrize("kind", BUILD)
def test_compilation_without_breaks_and_without_more_of_it_by_merging(kind: str) -> None:
    layer = build(kind)
    x = example(kind)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(4):
        layer.train()
        unmerged = compiled(x)
        layer.eval()
        # float32, the same sums in another order
        torch.testing.assert_close(compiled(x), unmerged, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            layer.lora_A.mul_(0.5)
    assert counter.frame_count == 2  # one merged, one unmerged


def test_the_merged_forward_is_the_plain_layers() -> None:
    layer = build("linear").eval()
    x = example("linear")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as merged:
        layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as plain:
        F.linear(x, layer.weight, layer.bias)
    assert [event.name for event in merged.events()] == [event.name for event in plain.events()]


def test_no_update_of_the_weights_size_is_formed() -> None:
    """The unmerged forward pass allocates tensors of tokens × features and tokens × r, nothing of features × features."""
    layer = Linear(512, 512, r=4)
    x = torch.randn(2, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x)
    assert max(event.cpu_memory_usage for event in profile.events()) < 512 * 512 * 4 / 8


def test_reset_parameters_of_a_transposed_layer_uses_its_own_fan() -> None:
    layer = Linear(400, 4, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    assert layer.weight.shape == (400, 4)
    assert layer.weight.abs().max() <= 400**-0.5


def test_an_embedding_with_padding() -> None:
    layer = build("embedding", padding_idx=2)
    y = layer(torch.tensor([2, 3]))
    y.sum().backward()
    assert (layer.lora_A.grad[:, 2] == 0).all()
    assert (layer.lora_A.grad[:, 3] != 0).all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": -1}, "r must be an integer"),
        ({"r": 2.0}, "r must be an integer"),
        ({"r": True}, "r must be an integer"),
        ({"r": 2, "lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"r": 2, "lora_dropout": 1.5}, "lora_dropout must be a probability"),
        ({"r": 2, "undo": "none"}, "undo must be one of"),
    ],
)
def test_settings_that_no_layer_can_have(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        Linear(4, 4, **kwargs)


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(LayerError, match="the length of enable_lora, 3, must divide out_features, 8"):
        MergedLinear(4, 8, r=2, enable_lora=[True, True, False])

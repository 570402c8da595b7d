"""What every type of layer has from `Mergeable`: merging, restoring, moving, several adapters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafold.errors import LayerError, NonFiniteError
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.undo.keep import UndoKind
from lorafold.nn.layers.conv import Conv1d, Conv2d, Conv3d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.mergeable import Mergeable

KINDS: dict[str, Callable[..., Mergeable]] = {
    "linear": lambda **kw: Linear(9, 7, r=3, lora_alpha=2, **kw),
    "linear_fan": lambda **kw: Linear(9, 7, r=3, lora_alpha=2, fan_in_fan_out=True, **kw),
    "embedding": lambda **kw: Embedding(9, 7, r=3, lora_alpha=2, **kw),
    "merged": lambda **kw: MergedLinear(9, 12, r=2, lora_alpha=3, enable_lora=[True, False, True], **kw),
    "merged_fan": lambda **kw: MergedLinear(9, 12, r=2, enable_lora=[False, True], fan_in_fan_out=True, **kw),
    "conv1d": lambda **kw: Conv1d(4, 6, 3, r=2, **kw),
    "conv2d": lambda **kw: Conv2d(4, 6, (3, 2), r=2, groups=2, **kw),
    "conv3d": lambda **kw: Conv3d(4, 6, 2, r=2, **kw),
    "conv2d_channels_last": lambda **kw: Conv2d(4, 6, 3, r=2, **kw).to(memory_format=torch.channels_last),
}
UNDOS: list[UndoKind] = ["copy", "copy-cpu", "compact"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().clone().view(INTEGERS[x.element_size()])


def train_some(layer: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=scale)


def build(kind: str, **kw: Any) -> Mergeable:
    layer = KINDS[kind](**kw)
    train_some(layer)
    return layer


def example(layer: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(5)
    if isinstance(layer, Embedding):
        return torch.randint(0, 9, (2, 5), generator=g)
    if hasattr(layer, "conv"):
        return torch.randn(2, 4, *[5] * len(layer.conv.kernel_size), generator=g).to(layer.weight.dtype)
    return torch.randn(2, 3, 9, generator=g).to(layer.weight.dtype)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    undo=st.sampled_from(UNDOS),
    dtype=st.sampled_from(DTYPES),
    steps=st.lists(
        st.sampled_from(
            ["eval", "train", "merge", "unmerge", "factors", "scaling", "merge_weights", "add", "activate", "copy", "pickle"]
        ),
        max_size=14,
    ),
)
def test_the_base_survives_anything(kind: str, undo: UndoKind, dtype: torch.dtype, steps: list[str]) -> None:
    layer = build(kind, undo=undo, dtype=dtype)
    base, weight = bits(layer.weight), layer.weight
    for i, step in enumerate(steps):
        if step in ("eval", "train", "merge", "unmerge"):
            getattr(layer, step)()
        elif step == "factors":
            train_some(layer, scale=1.0)
        elif step == "scaling":
            layer.scaling = float(i)
        elif step == "merge_weights":
            layer.merge_weights = not layer.merge_weights
        elif step == "add":
            layer.add_adapter(f"a{i}", r=1)
            train_some(layer)
        elif step == "activate":
            layer.set_active(layer.adapter_names[-2:])
        else:
            layer = copy.deepcopy(layer) if step == "copy" else pickle.loads(pickle.dumps(layer))
            weight = layer.weight
        assert layer.weight is weight
        if not layer.merged:
            assert torch.equal(bits(layer.weight), base)
    layer.train()
    assert not layer.merged
    assert torch.equal(bits(layer.weight), base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_compute_the_same(kind: str, dtype: torch.dtype) -> None:
    layer = build(kind, dtype=dtype)
    x = example(layer)
    with torch.no_grad():
        y = layer(x)
        merged = layer.eval()(x)
    # a unit of the output's size for each of a few roundings: of the weight, of the products, of the sum over up to 36 inputs
    tolerance = 40 * torch.finfo(dtype).eps * float(y.abs().max())
    assert (merged - y).abs().max() <= tolerance


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_merged_weight_is_the_kernels(dtype: torch.dtype, precision: Any) -> None:
    layer = build("linear", dtype=dtype, precision=precision)
    expected = merge_weight(layer.weight.detach(), layer.updates()[0].updates, precision=precision)
    layer.eval()
    assert torch.equal(layer.weight, expected)


def test_what_every_layer_adds_is_loralibs_formula() -> None:
    """ΔW of each type in float64, against its definition written out."""
    for kind, kw in (("linear", {}), ("linear_fan", {}), ("embedding", {}), ("conv2d", {})):
        layer = build(kind, dtype=torch.float64, **kw)
        delta = layer.lora_B @ layer.lora_A * layer.scaling
        delta = delta.T if kind in ("linear_fan", "embedding") else delta
        expected = layer.weight.detach() + delta.reshape(layer.weight.shape)
        # float64 sums of 3 products, in another order
        torch.testing.assert_close(layer.eval().weight.detach(), expected.detach(), rtol=1e-14, atol=1e-15)


def test_merging_stays_in_the_same_memory() -> None:
    layer = build("linear")
    place = layer.weight.data_ptr()
    view = layer.weight.detach()
    layer.eval()
    assert layer.weight.data_ptr() == place
    assert torch.equal(view, layer.weight)


@pytest.mark.parametrize("undo", UNDOS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_dtype_while_merged_is_unmerge_change_merge(kind: str, undo: UndoKind) -> None:
    layer = build(kind, undo=undo)
    other = copy.deepcopy(layer).half()
    layer.eval().half()
    other.eval()
    assert layer.merged
    assert torch.equal(bits(layer.weight), bits(other.weight))
    assert torch.equal(bits(layer.train().weight), bits(other.train().weight))


@pytest.mark.parametrize("undo", UNDOS)
def test_a_move_while_merged_keeps_the_merged_bits_and_the_base(undo: UndoKind) -> None:
    layer = build("linear", undo=undo, dtype=torch.bfloat16)
    base = bits(layer.weight)
    layer.eval()
    merged = bits(layer.weight)
    train_some(layer)
    layer.to("cpu").share_memory()
    layer.requires_grad_(False)
    assert torch.equal(bits(layer.weight), merged)
    assert torch.equal(bits(layer.train().weight), base)


@pytest.mark.parametrize("undo", UNDOS)
def test_a_saved_merged_module_still_unmerges(undo: UndoKind) -> None:
    layer = build("merged", undo=undo, dtype=torch.float16)
    base = bits(layer.weight)
    stored = io.BytesIO()
    torch.save(layer.eval(), stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    assert torch.equal(bits(loaded.train().weight), base)


def test_a_copy_and_its_original_unmerge_apart() -> None:
    layer = build("linear")
    base = bits(layer.weight)
    twin = copy.deepcopy(layer.eval())
    layer.train()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(bits(twin.train().weight), base)


def test_nothing_of_the_undo_is_in_the_state_dict() -> None:
    layer = build("linear")
    keys = list(layer.state_dict())
    assert list(layer.eval().state_dict()) == keys == ["weight", "bias", "lora_A", "lora_B"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_merging_in_any_grad_mode(mode: Any) -> None:
    layer = build("linear")
    base = bits(layer.weight)
    with mode():
        layer.eval()
    assert layer.weight.requires_grad is False
    assert torch.equal(bits(layer.train().weight), base)
    layer(example(layer)).sum().backward()
    assert layer.lora_A.grad is not None


def test_merging_is_not_touched_by_autocast() -> None:
    layer, other = build("linear"), None
    other = copy.deepcopy(layer).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.eval()
    assert torch.equal(layer.weight, other.weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_that_is_not_finite_is_refused_before_anything_is_written(factor: str, value: float) -> None:
    layer = build("merged")
    base = bits(layer.weight)
    with torch.no_grad():
        getattr(layer, factor)[0, 0] = value
    with pytest.raises(NonFiniteError, match=f"{factor} of the adapter 'default'"):
        layer.eval()
    assert not layer.merged
    assert layer.training
    assert torch.equal(bits(layer.weight), base)


def test_a_failure_in_the_second_block_restores_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build("merged")
    base = bits(layer.weight)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return merge_weight(*args, **kwargs)

    monkeypatch.setattr("lorafold.kernel.undo.keep.merge_weight", failing)
    with pytest.raises(MemoryError):
        layer.eval()
    assert calls == 2
    assert torch.equal(bits(layer.weight), base)


def test_a_base_that_cannot_be_proven_leaves_the_layer_merged() -> None:
    layer = build("merged", undo="compact")
    layer.eval()
    with torch.no_grad():
        layer.weight[0, 0] += 1
    merged = bits(layer.weight)
    with pytest.raises(LayerError, match="do not come out with the checksum"):
        layer.train()
    assert layer.merged
    assert torch.equal(bits(layer.weight), merged)
    with torch.no_grad():
        layer.weight[0, 0] -= 1


def test_bytes_kept_are_those_of_the_touched_rows() -> None:
    layer = build("merged")
    assert layer.kept_nbytes == 0
    assert layer.eval().kept_nbytes == 9 * 8 * 4  # type: ignore[attr-defined]


def test_the_repr_says_what_matters() -> None:
    layer = build("linear")
    assert "r=3, lora_alpha=2" in repr(layer)
    assert "merged" in repr(layer.eval())

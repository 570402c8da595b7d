"""All of a model's layers, or none."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.errors import LayerError, NonFiniteError
from lorafold.kernel.merge import merge_weight
from lorafold.nn import merge, merged, model_lock, set_active, swap, unmerge
from lorafold.nn.attaching import add_adapter
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear


def build(undo: Any = "copy") -> nn.Sequential:
    model = nn.Sequential(
        Embedding(9, 8, r=2, undo=undo),
        nn.ReLU(),
        Linear(8, 6, r=3, undo=undo),
        MergedLinear(6, 4, r=2, enable_lora=[True, True], undo=undo),
        nn.ModuleList([Conv2d(2, 2, 3, r=1, undo=undo)]),
    )
    add_adapter(model, "style", r=1, lora_alpha=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def flags(model: nn.Module) -> list[bool]:
    return [module.merged for module in model.modules() if hasattr(module, "merged")]


@pytest.mark.parametrize("undo", ["copy", "compact"])
def test_merge_and_unmerge(undo: str) -> None:
    model = build(undo)
    base = weights(model)
    merge(model)
    assert flags(model) == [True] * 4
    once = weights(model)
    merge(model)
    assert same(model, once)
    unmerge(model)
    unmerge(model)
    assert flags(model) == [False] * 4
    assert same(model, base)


@pytest.mark.parametrize("name", ["0.lora_A", "2.lora_B", "4.0.lora_A"])
def test_an_adapter_that_is_not_finite_stops_it_before_the_first_write(name: str) -> None:
    model = build()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = torch.nan
    version = model[0].weight._version
    with pytest.raises(NonFiniteError, match=f"^{name.rpartition('.')[0]}: lora_[AB] of the adapter 'default'"):
        merge(model)
    assert flags(model) == [False] * 4
    assert model[0].weight._version == version


@pytest.mark.parametrize("undo", ["copy", "compact"])
@pytest.mark.parametrize("call", range(1, 10))
def test_a_failure_in_any_layer_leaves_all_as_they_were(call: int, undo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(undo)
    base = weights(model)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError
        return merge_weight(*args, **kwargs)

    for place in ("keep", "compact"):
        monkeypatch.setattr(f"lorafold.kernel.undo.{place}.merge_weight", failing)
    try:
        merge(model)
    except MemoryError:
        assert flags(model) == [False] * 4
        assert same(model, base)
    else:
        assert calls < call
        unmerge(model)
    assert same(model, base)


def test_a_base_that_is_not_known_stops_unmerge_for_all() -> None:
    model = build("compact")
    merge(model)
    with torch.no_grad():
        model[2].weight[0, 0] += 1
        model[0].lora_A.mul_(2)  # what was merged stays, though it could not be merged again
    before = weights(model)
    with pytest.raises(LayerError, match=r"^2: the base weight cannot be restored"):
        unmerge(model)
    assert flags(model) == [True] * 4
    assert same(model, before)


def test_within_merged_and_after_it() -> None:
    model = build()
    base = weights(model)
    model[2].merge()

    def fail_within() -> None:
        with merged(model) as inner:
            assert inner is model
            assert flags(model) == [True] * 4
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert flags(model) == [False, True, False, False]  # the one that was merged before is merged still
    unmerge(model)
    assert same(model, base)


@pytest.mark.parametrize("undo", ["copy", "copy-cpu", "compact"])
@pytest.mark.parametrize("first", ["merged", "unmerged", "some"])
def test_swap_equals_a_fresh_merge(first: str, undo: str) -> None:
    model = build(undo)
    base = weights(model)
    set_active(model, "style")
    merge(model)
    fresh = weights(model)
    unmerge(model)
    set_active(model, "default")
    if first != "unmerged":
        merge(model)
    if first == "some":
        model[2].unmerge()
    for _ in range(3):
        swap(model, "style")
        assert same(model, fresh)
        swap(model, ["default", "style"])
        assert not same(model, fresh)
    swap(model, "style")
    unmerge(model)
    assert same(model, base)


def test_swap_validates_all_before_the_first_write() -> None:
    model = build()
    merge(model)
    before = weights(model)
    with torch.no_grad():
        bad: Any = model[4][0].lora_adapters["style"].lora_B
        bad[0, 0] = torch.inf
    for name, message in (("style", r"^4\.0: lora_B of the adapter 'style'"), ("nobody", "no layer has an adapter named 'nobody'")):
        with pytest.raises(ValueError, match=message):
            swap(model, name)
    before["4.0.lora_adapters.style.lora_B"] = bad.detach().clone()
    assert same(model, before)
    assert {layer.active_adapters for layer in (model[0], model[2], model[3], model[4][0])} == {("default",)}


def test_a_swap_that_fails_halfway_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    merge(model)
    before = weights(model)
    for fail_at in range(1, 6):
        calls = 0

        def failing(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == fail_at:  # noqa: B023 - used within this turn
                raise MemoryError
            return merge_weight(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("lorafold.kernel.undo.keep.merge_weight", failing)
            with pytest.raises(MemoryError):
                swap(model, "style")
        assert flags(model) == [True] * 4
        assert same(model, before), fail_at


def test_an_adapter_that_only_some_layers_have() -> None:
    model = build()
    model[2].remove_adapter("style")
    base = model[2].weight.detach().clone()
    swap(model, "style")
    assert model[2].active_adapters == ()
    assert torch.equal(model[2].weight, base)


def test_forward_passes_under_the_lock_see_one_adapter_or_the_other() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Linear(32, 32, r=2) for _ in range(6)])
    add_adapter(model, "style", r=2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(4, 32)
    expected = []
    with torch.no_grad():
        for name in ("default", "style"):
            swap(model, name)
            expected.append(model(x))
    wrong: list[int] = []
    stop = threading.Event()

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                with model_lock(model):
                    y = model(x)
                if not any(torch.equal(y, one) for one in expected):
                    wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40):
        swap(model, "default" if i % 2 else "style")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert model_lock(model) is model_lock(model)

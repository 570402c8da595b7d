"""What others put around a layer, hooks and a `forward` of their own, goes on through attach, eval, train, export and detach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor, nn

from lorafold.errors import LayerError
from lorafold.nn import attach, detach, iter_merged, merge, merged_state_dict

BUILT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(3, 8)),
    "embedding": (lambda: nn.Embedding(9, 6), lambda: torch.tensor([[1, 2], [8, 0]])),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), lambda: torch.randn(2, 3, 7, 7)),
    "convolution in groups": (lambda: nn.Conv1d(4, 8, 3, groups=2), lambda: torch.randn(2, 4, 9)),
}


def close(one: Tensor, other: Tensor) -> bool:
    """float32 sums of some tens of numbers of size 1 in another order: off by some tens of 2⁻²⁴ times their size."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def trained(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture(params=BUILT)
def one(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    module, x = BUILT[request.param]
    return nn.Sequential(module()), x()


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_hooks_go_on_and_can_be_removed(one: tuple[nn.Sequential, Tensor]) -> None:
    model, x = one
    seen: list[str] = []
    hooked: Any = model[0]
    handles = [
        hooked.register_forward_pre_hook(lambda *_: seen.append("before")),
        hooked.register_forward_hook(lambda module, x, y: 2 * y),
        hooked.register_forward_hook(lambda *_, **__: seen.append("always"), with_kwargs=True, always_call=True),
        hooked.register_full_backward_hook(lambda *_: seen.append("back")),
    ]
    doubled = model(x)
    attach(model, ["0"], r=2)
    assert torch.equal(model(x), doubled)
    trained(model)
    seen.clear()
    apart = model(x)
    apart.sum().backward()
    assert seen == ["before", "always", "back"]
    assert not close(apart, doubled)
    assert close(model.eval()(x), apart)  # the hook doubles the whole sum, merged and not
    later = model[0].register_forward_hook(lambda *_: seen.append("later"))
    detach(model)
    seen.clear()
    assert close(model(x), doubled)
    assert seen == ["before", "always", "later"]
    for handle in (*handles, later):
        handle.remove()
    seen.clear()
    assert close(2 * model(x), doubled)
    assert seen == []


def test_a_forward_of_anothers_does_with_the_sum_what_it_did_with_the_weight(one: tuple[nn.Sequential, Tensor]) -> None:
    model, x = one
    inner = model[0].forward
    model[0].forward = lambda z: 3 * inner(z) + 1  # type: ignore[method-assign]
    before = model(x)
    attach(model, ["0"], r=2)
    assert close(model(x), before)
    trained(model)
    apart = model(x)
    apart.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    export = dict(iter_merged(model))
    assert close(model.eval()(x), apart)
    assert close(model.train()(x), apart)
    detach(model)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model[0].weight.copy_(next(iter(export.values())))
    assert close(model(x), apart)


def test_dropout_has_no_place_within_such_a_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inner = model[0].forward
    model[0].forward = lambda z: 3 * inner(z)  # type: ignore[method-assign]
    with pytest.raises(LayerError, match="dropout cannot be put inside it"):
        attach(model, ["0"], r=2, lora_dropout=0.1)
    assert type(model[0]) is nn.Linear


def test_the_hooks_of_accelerate_that_move_inputs_go_on(one: tuple[nn.Sequential, Tensor]) -> None:
    model, x = one

    class Spy(AlignDevicesHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Spy.calls += 1
            return super().pre_forward(module, *args, **kwargs)

    add_hook_to_module(model[0], Spy("cpu", io_same_device=True))
    before = model(x)
    attach(model, ["0"], r=2, lora_dropout=0.0)
    assert torch.equal(model(x), before)
    apart = trained(model)(x)
    assert close(model.eval()(x), apart)
    assert model[0].merged
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert close(model.train()(x), apart)
    detach(model)
    assert torch.equal(model(x), before)
    assert Spy.calls == 8
    assert isinstance(model[0]._hf_hook, Spy)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_that_are_offloaded_stay_so(one: tuple[nn.Sequential, Tensor]) -> None:
    """`eval()` leaves them, and the forward pass adds; an export takes them from where they are; merging in place is refused."""
    model, x = one
    before = model(x)
    plain = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attach(model, ["0"], r=2)
    assert model[0].weight.is_meta
    assert torch.equal(model(x), before)
    apart = trained(model)(x)
    apart.sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    assert close(model.eval()(x), apart)
    assert not model[0].merged
    with pytest.raises(LayerError, match="0: the weight of this layer is offloaded by accelerate"):
        merge(model)
    plain.load_state_dict(merged_state_dict(model))
    assert close(plain(x), apart)
    assert model[0].weight.is_meta or model[0].plain.weight.is_meta
    detach(model)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_once_brought_back_they_are_merged() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    before = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attach(model, ["0"], r=2)
    apart = trained(model)(x)
    remove_hook_from_submodules(model)
    assert close(model.eval()(x), apart)
    assert model[0].merged
    detach(model)
    assert torch.equal(model(x), before)
    assert not hasattr(model[0], "_hf_hook")

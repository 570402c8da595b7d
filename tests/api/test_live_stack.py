"""Merges into a model in memory come out in order, from the very tensors that they went into, or say why they cannot."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lorafold
from lorafold.errors import LayerError, LorafoldWarning, UnsupportedAdapterError
from models import save_adapter

Tensors = dict[str, torch.Tensor]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fd = nn.Linear(8, 8), nn.Linear(8, 8)


def bits(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two on fc, and one on fd."""
    folder = tmp_path_factory.mktemp("stack")
    of = [save_adapter(Two(), folder / f"{seed}", seed=seed, target_modules=["fc"]) for seed in (1, 2)]
    return of[0], of[1], save_adapter(Two(), folder / "3", seed=3, target_modules=["fd"])


def test_the_last_in_is_the_first_out(adapters: tuple[Path, Path, Path]) -> None:
    model = Two()
    before = bits(model)
    one = lorafold.merge_into(model, [adapters[0]])
    between = bits(model)
    two = lorafold.merge_into(model, [adapters[1]])
    both = bits(model)
    with pytest.raises(LayerError, match=r"2 was merged into fc\.weight after .*1\n\nhint: unmerge that first"):
        one.unmerge()
    assert one.merged
    assert same(bits(model), both)
    two.unmerge()
    assert same(bits(model), between)
    one.unmerge()
    assert same(bits(model), before)


def test_merges_that_do_not_meet_come_out_in_any_order(adapters: tuple[Path, Path, Path]) -> None:
    model = Two()
    before = bits(model)
    one, other = (lorafold.merge_into(model, [adapters[i]]) for i in (0, 2))
    one.unmerge()
    assert torch.equal(model.fc.weight, before["fc.weight"])
    other.unmerge()
    assert same(bits(model), before)


def test_the_order_holds_across_a_model_and_a_part_of_it(adapters: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": Two()})
    before = bits(model)
    one = lorafold.merge_into(model["body"], [adapters[0]])
    whole = save_adapter(nn.ModuleDict({"body": Two()}), tmp_path / "whole", target_modules=["fc"])
    two = lorafold.merge_into(model, [whole])
    with pytest.raises(LayerError, match="unmerge that first"):
        one.unmerge()
    two.unmerge()
    one.unmerge()
    assert same(bits(model), before)


def test_a_later_merge_that_nothing_can_take_out_is_said(adapters: tuple[Path, Path, Path]) -> None:
    model = Two()
    one = lorafold.merge_into(model, [adapters[0]])
    lorafold.merge_into(model, [adapters[1]])
    gc.collect()
    with pytest.raises(LayerError, match="what merge_into returned for them is gone"):
        one.unmerge()


def by_assigning(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def by_hand(model: Any) -> None:
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone())


def by_removing(model: Any) -> None:
    del model.fc


def by_parametrizing(model: Any) -> None:
    parametrizations.weight_norm(model.fc)


def by_moving_to_another_type(model: Any) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("replace", [by_assigning, by_hand, by_removing, by_parametrizing, by_moving_to_another_type])
def test_a_tensor_that_was_replaced_is_named(adapters: tuple[Path, Path, Path], replace: Callable[[Any], None]) -> None:
    model = Two()
    own = model.fc
    before, held = bits(model), own.weight
    merge = lorafold.merge_into(model, [adapters[0], adapters[2]])
    replace(model)
    after = bits(model)
    with pytest.raises(LayerError, match=r"fc\.weight is another tensor than the one that was merged") as caught:
        merge.unmerge()
    assert "put the former parameter back" in str(caught.value)
    assert merge.merged
    assert same(bits(model), after)
    if replace is by_hand:
        own.weight = held
        merge.unmerge()
        assert same(bits(model), before)


@pytest.mark.parametrize("move", [lambda m: m.half().float(), lambda m: m.to("cpu"), lambda m: m.share_memory()])
def test_moves_that_keep_the_parameters_are_no_replacement(adapters: tuple[Path, Path, Path], move: Any) -> None:
    model = Two()
    before = bits(model)
    merge = lorafold.merge_into(model, [adapters[0]])
    move(model)
    merge.unmerge()
    assert torch.equal(model.fc.weight, before["fc.weight"])


def by_loading(model: Any) -> None:
    model.load_state_dict(Two().state_dict())


def by_training(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.fc(torch.randn(2, 8)).sum().backward()
    optimizer.step()


def by_writing(model: Any) -> None:
    with torch.no_grad():
        model.fc.weight[0, 0] = 3.0


@pytest.mark.parametrize("write", [by_loading, by_training, by_writing])
def test_a_tensor_that_others_wrote_to_is_not_overwritten(adapters: tuple[Path, Path, Path], write: Callable[[Any], None]) -> None:
    model = Two()
    one = lorafold.merge_into(model, [adapters[0]])
    two = lorafold.merge_into(model, [adapters[1]])
    two.unmerge()
    write(model)
    after = bits(model)
    with pytest.raises(LayerError, match=r"fc\.weight was written to since .*1 was merged"):
        one.unmerge()
    assert one.merged
    assert same(bits(model), after)


def test_what_is_merged_twice_is_said(adapters: tuple[Path, Path, Path]) -> None:
    model = Two()
    before = bits(model)
    one = lorafold.merge_into(model, [adapters[0]])
    with pytest.warns(LorafoldWarning, match=r"1 is merged into fc\.weight a second time"):
        two = lorafold.merge_into(model, [adapters[0], adapters[2]])
    two.unmerge()
    one.unmerge()
    assert same(bits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafold.merge_into(model, [adapters[0]]).unmerge()


def test_hooks_of_state_dicts_may_copy_and_rename(adapters: tuple[Path, Path, Path]) -> None:
    plain, model = Two(), Two()
    model.load_state_dict(plain.state_dict())

    def hook(module: Any, state: Any, prefix: Any, metadata: Any) -> None:
        for key in list(state):
            state[f"saved.{key}"] = state.pop(key).detach().clone()

    model.register_state_dict_post_hook(hook)
    before = model.fc.weight.detach().clone()
    lorafold.merge_into(plain, [adapters[0]])
    merge = lorafold.merge_into(model, [adapters[0]])
    assert torch.equal(model.fc.weight, plain.fc.weight)
    merge.unmerge()
    assert torch.equal(model.fc.weight, before)


def overlapping(kind: str) -> Any:
    model: Any = Two()
    flat = model.fc.weight.detach().view(-1)
    if kind == "a parameter at an offset":
        model.other = nn.Parameter(flat[8:24])
    elif kind == "integers, not saved":
        model.register_buffer("other", flat.view(torch.int32)[5:], persistent=False)
    else:
        model.register_buffer("other", flat[-1:])
    return model


@pytest.mark.parametrize("kind", ["a parameter at an offset", "integers, not saved", "a buffer"])
def test_overlaps_are_refused(adapters: tuple[Path, Path, Path], kind: str) -> None:
    model = overlapping(kind)
    before = model.fc.weight.detach().clone()
    with pytest.raises(UnsupportedAdapterError, match=r"fc\.weight and other share their memory"):
        lorafold.merge_into(model, [adapters[0]])
    assert torch.equal(model.fc.weight, before)
    lorafold.merge_into(model, [adapters[2]]).unmerge()  # which has no part in it


def test_models_that_cannot_be_written_to_are_refused_by_name(adapters: tuple[Path, Path, Path]) -> None:
    for change, words in (
        (lambda m: parametrizations.weight_norm(m.fc), "the weight of fc is computed by the parametrization _WeightNorm"),
        (lambda m: m.to("meta"), r"fc\.weight is on the meta device"),
        (lambda m: lorafold.nn.attach(m, ["fd"], r=2), "the model has LoRA layers of lorafold"),
    ):
        model = Two()
        change(model)
        with pytest.raises(LayerError, match=words):
            lorafold.merge_into(model, [adapters[0]])


def test_threads_that_merge_for_a_while_leave_the_base(adapters: tuple[Path, Path, Path]) -> None:
    """Whoever leaves first comes out with the one that was merged on top of it."""
    model = Two()
    before, errors = bits(model), []

    def rounds(adapter: Path) -> None:
        try:
            for _ in range(50):
                with lorafold.merge_into(model, [adapter]):
                    pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rounds, args=(adapter,)) for adapter in adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert same(bits(model), before)


def test_within_one_thread_leaving_in_another_order_is_an_error(adapters: tuple[Path, Path, Path]) -> None:
    model = Two()
    with pytest.raises(LayerError, match="unmerge that first"), lorafold.merge_into(model, [adapters[0]]):
        kept = lorafold.merge_into(model, [adapters[1]])
    assert kept.merged


def test_models_made_in_inference_mode_are_written_to(adapters: tuple[Path, Path, Path]) -> None:
    with torch.inference_mode():
        model = Two()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lorafold.merge_into(model, [adapters[0]]):
        assert not torch.equal(model.fc.weight, before["fc.weight"])
    assert same(bits(model), before)
    model = Two()
    before = bits(model)
    with torch.inference_mode():
        merge = lorafold.merge_into(model, [adapters[0]])
    merge.unmerge()
    assert same(bits(model), before)

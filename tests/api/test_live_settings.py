"""No setting of torch changes a bit of what the live verbs do: its default device and dtype, inference mode, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorafold
from lorafold import nn as live
from models import save_adapter
from peft_cases import MLP, Words

Tensors = dict[str, Tensor]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def bits(model: nn.Module) -> Tensors:
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def built(undo: Any = "copy") -> nn.Module:
    """A layer of each kind, in bfloat16, with LoRA that does something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Embedding(9, 4), nn.Conv2d(3, 4, 3)).bfloat16()
    live.attach(model, ["0", "1", "2"], r=2, undo=undo)
    for layer in model:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("undo", ["copy", "compact"])
def test_layers(setting: str, undo: str) -> None:
    wanted, model = built(undo), built(undo)
    base = bits(model)
    exported = live.merged_state_dict(wanted)
    drawn = dict(live.iter_merged(wanted, rounding="stochastic", seed=3))
    wanted.eval()
    with SETTINGS[setting]():
        found = live.merged_state_dict(model)
        other = dict(live.iter_merged(model, rounding="stochastic", seed=3))
        model.eval()
    assert same(found, exported)
    assert same(other, drawn)
    assert same(bits(model), bits(wanted))
    with SETTINGS[setting]():
        model.train()
    assert same(bits(model), base)


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lora": (MLP, {"target_modules": ["lin0", "lin1"], "lora_bias": True, "modules_to_save": ["head"]}),
    "dora": (MLP, {"target_modules": ["lin0", "lin1"], "use_dora": True}),
    "rows": (Words, {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 5]}}),
    "embedding": (Words, {"target_modules": ["emb"], "use_dora": True}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merging_into_a_model(tmp_path: Path, setting: str, case: str, rounding: Any) -> None:
    kind, config = CASES[case]
    torch.manual_seed(0)
    wanted, model = kind().bfloat16(), kind().bfloat16()
    model.load_state_dict(wanted.state_dict())
    before = bits(model)
    adapter = save_adapter(kind(), tmp_path / "adapter", **config)
    lorafold.merge_into(wanted, [adapter], rounding=rounding, seed=7)
    with SETTINGS[setting]():
        merge = lorafold.merge_into(model, [adapter], rounding=rounding, seed=7)
    assert same(bits(model), bits(wanted))
    with SETTINGS[setting]():
        merge.unmerge()
    assert same(bits(model), before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_of_peft(setting: str) -> None:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lin0", "lin1"], r=2, use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(MLP().bfloat16(), config)
    before, wanted = bits(model), live.merged_state_dict(model)
    with SETTINGS[setting]():
        assert same({n: v.clone() for n, v in live.merged_state_dict(model).items()}, wanted)
        with live.merged(model):
            found = bits(model.get_base_model())
    assert same(found, wanted)
    assert same(bits(model), before)


@pytest.mark.parametrize("setting", SETTINGS)
def test_loading_into_a_model(tmp_path: Path, setting: str) -> None:
    adapter = save_adapter(MLP(), tmp_path / "adapter", target_modules=["lin0", "lin1"])
    torch.manual_seed(0)
    wanted, model = MLP(), MLP()
    model.load_state_dict(wanted.state_dict())
    live.load_adapter_into(wanted, adapter)
    with SETTINGS[setting]():
        live.load_adapter_into(model, adapter)
    assert same(bits(model.eval()), bits(wanted.eval()))

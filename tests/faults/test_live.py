"""Rows 55 to 57: merging in a model in memory is all or nothing, whatever state it is in."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import lorafold
from lorafold.errors import LorafoldError
from models import edit_json, edit_tensors, plain_adapter, rewritten


def model(layers: int = 2) -> nn.Module:
    """`model.layers.{i}.{q_proj,v_proj}` with LoRA that does something, in training."""
    torch.manual_seed(0)
    inner = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q_proj", "v_proj")}) for _ in range(layers))}
    )
    found = nn.ModuleDict({"model": inner})
    lorafold.nn.attach(found, ["q_proj", "v_proj"], r=2, lora_alpha=4)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return found.train()


def bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in module.state_dict(keep_vars=True).items()}


def weights(module: nn.Module) -> dict[str, bytes]:
    return {name: value for name, value in bits(module).items() if "lora_" not in name}


def test_row_55_merged_twice_and_changed_while_merged() -> None:
    layer: Any = model()["model"]["layers"][0]["q_proj"]  # type: ignore[index]
    before = layer.weight.detach().clone()
    layer.train()  # not merged: nothing to undo
    assert torch.equal(layer.weight, before)
    layer.eval()
    merged = layer.weight.detach().clone()
    layer.eval()
    assert torch.equal(layer.weight, merged)
    with torch.no_grad():
        layer.lora_A.add_(1)
        layer.scaling = 100.0 if not isinstance(layer.scaling, dict) else layer.scaling
    layer.train()
    assert torch.equal(layer.weight, before)


def test_row_56_an_error_in_the_last_layer_leaves_none_merged() -> None:
    whole = model(4)
    before = weights(whole)
    last: Any = whole["model"]["layers"][3]["v_proj"]  # type: ignore[index]
    with torch.no_grad():
        last.lora_B.fill_(float("nan"))
    from lorafold.nn.merging_layers import merge

    with pytest.raises(LorafoldError):
        merge(whole)
    assert weights(whole) == before


@pytest.mark.parametrize("fault", ["rank", "shape", "nan", "base"])
def test_row_57_a_swap_is_held_to_everything_before_it_writes(tmp_path: Any, fault: str) -> None:
    whole = model()
    path = plain_adapter(tmp_path / "a", size=9 if fault == "shape" else 8)
    if fault == "rank":
        edit_json(path / "adapter_config.json", r=3)
    if fault == "nan":
        edit_tensors(path, lambda held: {name: tensor.fill_(float("inf")) for name, tensor in held.items()})
    if fault == "base":
        path = rewritten(path, tmp_path / "b", rename=lambda name: name.replace("1.v_proj", "7.v_proj"))
    before = bits(whole)
    with pytest.raises(LorafoldError):
        lorafold.nn.load_adapter_into(whole, path)
    assert bits(whole) == before


def test_many_merges_in_one_process_leave_nothing_open(road: Any) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for _ in range(10):
        lorafold.merge(road.base, [road.adapter], road.out, overwrite=True)
    files, memory = open_files(), resident()
    for _ in range(50):
        lorafold.merge(road.base, [road.adapter], road.out, overwrite=True)
    assert open_files() == files
    assert resident() - memory < 4_000_000  # 80 kB a merge: less than any of its buffers

"""Adapters on disk and in a model in memory: PEFT reads what is saved, and the reader for files reads it into layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorafold.errors import (
    AdapterError,
    LayerError,
    LorafoldError,
    NonFiniteError,
    OutputError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    UnsupportedAdapterError,
)
from lorafold.nn import merged_state_dict
from lorafold.nn.attaching import add_adapter, attach
from lorafold.nn.layers.conv import Conv1d, Conv2d
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.mergeable import Mergeable
from lorafold.nn.loading import load_adapter_into
from lorafold.nn.merging_layers import merge, set_active, unmerge
from lorafold.nn.saving import save_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8, bias=False)}) for _ in range(2))
        self.conv = nn.Conv1d(8, 8, 3)
        self.q = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.emb(x)
        for layer in self.layers:
            h = h + layer["q"](h).tanh() + layer["v"](h)
        return self.q(self.conv(h.transpose(1, 2)).transpose(1, 2))


X = torch.arange(9)[None]


def trained(model: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model


def net(targets: Any = ("emb", "layers.*", "conv"), **more: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Net()
    model = copy.deepcopy(plain)
    attach(model, targets, **{"r": 2, "lora_alpha": 5, **more})
    return plain, trained(model)


def test_peft_loads_what_was_saved_and_computes_the_same(tmp_path: Path) -> None:
    plain, model = net()
    y = model(X)
    save_adapter(model, tmp_path / "a", base_model="org/base", task_type=None)
    peft = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    # float32, some tens of terms a layer, in another order
    torch.testing.assert_close(peft(X), y, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"]) == (2, 5)


def test_ranks_and_alphas_that_differ_go_into_patterns(tmp_path: Path) -> None:
    plain, model = net(["layers.0.q"], r=4, lora_alpha=2)
    attach(model, ["layers.*.v", "layers.1.q"], r=2, lora_alpha=6)
    trained(model)
    model.layers[1]["v"].scaling = 0.7
    y = model(X)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["target_modules"] == "layers\\.0\\.q|layers\\.0\\.v|layers\\.1\\.q|layers\\.1\\.v"
    )  # "q" would mean the last layer too
    peft = PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(peft(X), y, rtol=1e-4, atol=1e-5)
    loaded = Net()
    loaded.load_state_dict(net()[0].state_dict())
    load_adapter_into(loaded, tmp_path)
    assert torch.equal(loaded(X), y)


@pytest.mark.parametrize("merged", [False, True])
def test_saving_does_not_change_the_model(merged: bool, tmp_path: Path) -> None:
    _, model = net()
    if merged:
        merge(model)
    before = copy.deepcopy(model.state_dict())
    save_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_fused_projection_is_saved_as_the_one_update_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(MergedLinear(8, 12, r=2, lora_alpha=3, enable_lora=[True, False, True]))
    trained(model)
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(8, 12))
    load_adapter_into(plain, tmp_path)
    expected = torch.zeros(12, 8)
    for block in model[0].updates():
        expected[block.start : block.start + block.length] = block.updates[0].dense(torch.float32)
    got = plain[0].updates()[0].updates[0].dense(torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # zeros added to float64 sums


def test_convolutions_that_peft_has_no_place_for(tmp_path: Path) -> None:
    for layer in (Conv2d(4, 4, 3, r=2), Conv1d(4, 4, 3, r=2, groups=2)):
        with pytest.raises(LayerError, match="not one of PEFT's"):
            save_adapter(nn.Sequential(layer), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_named_adapters_are_saved_each_for_itself(tmp_path: Path) -> None:
    plain, model = net("layers.*")
    add_adapter(model, "style", r=1, lora_alpha=4)
    trained(model)
    save_adapter(model, tmp_path, adapter="style")
    set_active(model, "style")
    load_adapter_into(plain, tmp_path, name="other")
    assert torch.equal(plain(X), model(X))
    with pytest.raises(LayerError, match="no layer of the model has an adapter named 'x'"):
        save_adapter(model, tmp_path, adapter="x")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    _, model = net()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(model, tmp_path / "file")


def saved(tmp_path: Path, targets: Any = ("emb", "layers.*")) -> tuple[nn.Module, nn.Module, Path]:
    plain, model = net(targets)
    return plain, model, save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("state", ["plain", "attached", "merged"])
def test_loading_into_a_model_in_any_state(state: str, tmp_path: Path) -> None:
    plain, model, path = saved(tmp_path)
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    if state != "plain":
        attach(plain, ["emb", "layers.0.*"], r=3)
        trained(plain)
    if state == "merged":
        merge(plain)
    names = load_adapter_into(plain, path)
    assert names == ["emb", "layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    unmerge(plain)
    assert torch.equal(plain(X), model(X))
    merge(plain)
    merge(model)
    assert torch.equal(plain(X), model(X))
    unmerge(plain)
    assert all(torch.equal(tensor, base[name]) for name, tensor in plain.state_dict().items() if "lora_" not in name)


def test_loading_what_peft_saved(tmp_path: Path) -> None:
    plain, _ = net()
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q", "v"], rank_pattern={"layers.0.q": 2})
    peft = trained(get_peft_model(copy.deepcopy(plain), config).eval())
    peft.save_pretrained(tmp_path)
    load_adapter_into(plain, tmp_path, undo="compact")
    # float32, some tens of terms a layer, in another order
    torch.testing.assert_close(plain(X), peft(X), rtol=1e-4, atol=1e-5)
    merge(plain)
    torch.testing.assert_close(plain(X), peft(X), rtol=1e-4, atol=1e-5)


def test_not_made_active_it_changes_nothing(tmp_path: Path) -> None:
    plain, model, path = saved(tmp_path, "layers.*")
    y = plain(X)
    load_adapter_into(plain, path, name="style", active=False)
    assert torch.equal(plain(X), y)
    set_active(plain, "style")
    assert torch.equal(plain(X), model(X))
    with pytest.raises(LayerError, match="already"):
        load_adapter_into(plain, path, name="style")


def change(path: Path, edit: Any) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def rename(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if "layers.1.q" in name]:
        tensors[name.replace("layers.1.q", "layers.1.qq")] = tensors.pop(name)


def to_nan(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.layers.1.v.lora_B.weight"][0, 0] = torch.nan


def drop(tensors: dict[str, Any]) -> None:
    del tensors["base_model.model.layers.1.v.lora_B.weight"]


def widen(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.layers.1.v.lora_B.weight"] = torch.zeros(9, 2)


def replace(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.q.weight"] = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (rename, LorafoldError, "qq"),
        (to_nan, NonFiniteError, "not finite"),
        (drop, AdapterError, "lora_B"),
        (widen, ShapeMismatchError, r"layers\.1\.v: lora_A and lora_B have shapes \(2, 8\) and \(9, 2\)"),
        (replace, LorafoldError, r"q\.weight|weight"),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_whatever_does_not_fit_leaves_the_model_as_it_was(
    attached: bool, edit: Any, error: Any, message: str, tmp_path: Path
) -> None:
    plain, _, path = saved(tmp_path)
    change(path, edit)
    if attached:
        attach(plain, "layers.*", r=2)
        merge(plain)
    modules, tensors = dict(plain.named_modules()), copy.deepcopy(plain.state_dict())
    with pytest.raises(error, match=message):
        load_adapter_into(plain, path)
    assert dict(plain.named_modules()) == modules
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.state_dict().items())


def test_modules_that_the_model_does_not_have(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path)
    model = Net()
    del model.layers[1]
    with pytest.raises(UnmatchedAdapterError, match="2 of 5 adapter modules are not in the model"):
        load_adapter_into(model, path)


def test_modules_that_cannot_take_it(tmp_path: Path) -> None:
    _, _, path = saved(tmp_path, "layers.0.*")
    model = Net()
    model.layers[0]["q"] = nn.Identity()
    with pytest.raises(UnsupportedAdapterError, match=r"layers\.0\.q is a Identity"):
        load_adapter_into(model, path)
    model.layers[0]["q"] = MergedLinear(8, 8, r=1, enable_lora=[True, True])
    with pytest.raises(UnsupportedAdapterError, match="MergedLinear"):
        load_adapter_into(model, path)
    assert not isinstance(model.layers[0]["v"], Mergeable)


def test_the_file_road_and_the_live_road_read_the_same_numbers(tmp_path: Path) -> None:
    plain, model, path = saved(tmp_path)
    loaded = copy.deepcopy(plain)
    load_adapter_into(loaded, path)
    one, two = merged_state_dict(model, precision="exact"), merged_state_dict(loaded, precision="exact")
    assert list(one) == list(two) == list(plain.state_dict())
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_dropout_is_kept_for_further_training(tmp_path: Path) -> None:
    plain, model = net("layers.*", lora_dropout=0.25)
    save_adapter(model, tmp_path)
    load_adapter_into(plain, tmp_path)
    layer: Linear = plain.layers[0]["q"]
    assert layer.lora_dropout.p == 0.25


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, (3, 2), stride=2), nn.Conv3d(4, 6, (2, 1, 3), padding=1)],
    ids=str,
)
def test_convolutions_that_peft_trained(conv: nn.Module, tmp_path: Path) -> None:
    plain = nn.Sequential(conv)
    peft = trained(get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, lora_alpha=3, target_modules=["0"])).eval())
    peft.save_pretrained(tmp_path)
    x = torch.randn(2, 4, *[6] * (conv.weight.dim() - 2))
    load_adapter_into(plain, tmp_path)
    # float32, sums of at most 36 terms, in another order
    torch.testing.assert_close(plain(x), peft(x), rtol=1e-4, atol=1e-5)
    merge(plain)
    torch.testing.assert_close(plain(x), peft(x), rtol=1e-4, atol=1e-5)


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 3))
    get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ShapeMismatchError, match="0: lora_A and lora_B have shapes"):
        load_adapter_into(grouped, tmp_path)
    assert type(grouped[0]) is nn.Conv2d

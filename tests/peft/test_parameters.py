"""Adapters of bare parameters: which wrapper is for which, how experts are packed, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
import peft_formulas as f
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AdapterConfigError, AdapterError, ShapeMismatchError, UnsupportedAdapterError
from models import edit_json, edit_tensors, refused, save_adapter

PREFIX = "base_model.model."


class Experts(nn.Module):
    """Two parameters of any names and shapes, registered in this order."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Model(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.experts = Experts(**shapes)


def built(path: Path, targets: list[str] | None = None, **shapes: tuple[int, ...]) -> tuple[Path, Path]:
    torch.manual_seed(5)
    base, model = path / "base", Model(**shapes)
    base.mkdir()
    save_file(model.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    names = [f"experts.{name}" for name in shapes] if targets is None else targets
    return base, save_adapter(model, path / "adapter", target_modules=[], target_parameters=names)


def own(adapter: Path) -> dict[str, Tensor]:
    return {n.removeprefix(PREFIX): t for n, t in load_file(adapter / "adapter_model.safetensors").items()}


def check(base: Path, adapter: Path, out: Path, wanted: dict[str, Callable[..., f.Sum | f.Number]], **options: str) -> None:
    lorafold.merge(base, [adapter], out, read_options=ReadOptions(**options) if options else None)  # type: ignore[arg-type]
    held, merged = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    for name, formula in wanted.items():
        assert torch.equal(merged[name], formula(held, own(adapter), name).rounded(torch.float32)), name


def test_shapes_tell_which_is_which_where_the_order_is_not_known(tmp_path: Path) -> None:
    """PEFT nests them in the order in which they were registered: here `zulu` is the inner one."""
    base, adapter = built(tmp_path, zulu=(3, 6, 8), alpha=(3, 8, 5))
    inner, outer = f.experts(1.5, "experts.base_layer", 3), f.experts(1.5, "experts", 3)
    check(base, adapter, tmp_path / "out", {"experts.zulu": inner, "experts.alpha": outer})


def test_the_order_that_is_known_tells_equal_shapes_apart(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, w1=(3, 6, 8), w2=(3, 8, 6), w3=(3, 6, 8))
    wanted = {f"experts.w{i + 1}": f.experts(1.5, "experts" + ".base_layer" * (2 - i), 3) for i in range(3)}
    check(base, adapter, tmp_path / "out", wanted)


def test_equal_shapes_of_an_unknown_order_are_refused(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, zulu=(3, 6, 8), alpha=(3, 6, 8))
    refused(base, [adapter], UnsupportedAdapterError, "experts has adapters for zulu, alpha", "2 orders fit their shapes")


@pytest.mark.parametrize("layout", ["peft", "expert-major", None])
def test_both_packings_of_experts(tmp_path: Path, layout: str | None) -> None:
    base, adapter = built(tmp_path, down_proj=(3, 6, 8))
    options = {} if layout is None else {"expert_layout": layout}
    wanted = {"experts.down_proj": f.experts(1.5, "experts", 3, major=layout == "expert-major")}
    check(base, adapter, tmp_path / "out", wanted, **options)
    notes = lorafold.plan(base, [adapter], read_options=ReadOptions(**options)).notes  # type: ignore[arg-type]
    assert any("expert_layout='expert-major'" in note for note in notes) is (layout is None)


def test_an_entry_without_a_module(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, ["down_proj"], gate_up_proj=(2, 6, 8), down_proj=(2, 8, 3))
    check(base, adapter, tmp_path / "out", {"experts.down_proj": f.experts(1.5, "experts", 2)})


def test_what_does_not_fit(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, gate_up_proj=(3, 6, 8), down_proj=(3, 8, 3))
    config, A = adapter / "adapter_config.json", f"{PREFIX}experts.lora_A.weight"
    held = load_file(adapter / "adapter_model.safetensors")
    assert lorafold.plan(base, [adapter]).count("merge") == 2

    edit_json(config, r=3)
    refused(base, [adapter], AdapterConfigError, "r says rank 3 for experts.gate_up_proj", "have rank 4")
    edit_json(config, r=4, target_parameters=["experts.down_proj"])
    refused(base, [adapter], AdapterError, "experts has adapters for 2 parameters, but target_parameters names 1 of it: down_proj")
    edit_json(config, target_parameters=["experts.gate_up_proj", "experts.down_proj", "experts.other"])
    refused(base, [adapter], AdapterError)
    edit_json(config, target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights="pissa")
    refused(base, [adapter], UnsupportedAdapterError, "experts.gate_up_proj is a bare parameter", "init_lora_weights is pissa")
    edit_json(config, init_lora_weights=True)

    edit_tensors(adapter, lambda held: {n: t for n, t in held.items() if ".base_layer." not in n})
    refused(base, [adapter], AdapterError, "experts has adapters for 1 parameters, but target_parameters names 2 of it")
    save_file(
        {n.replace("experts.lora", "experts.base_layer.base_layer.lora"): t for n, t in held.items()},
        config.with_name("adapter_model.safetensors"),
    )
    refused(base, [adapter], AdapterError, "experts has 3 adapters inside each other, but nothing of experts")
    for changed, part in (
        (held[A][:-1].contiguous(), "lora_A must be (E · r, in) and lora_B (out, r · E), found [11, 3] and [8, 12]"),
        (held[A].T.contiguous(), "found [3, 12]"),
        (held[A].flatten(), "found [36]"),
    ):
        save_file(held | {A: changed}, config.with_name("adapter_model.safetensors"))
        refused(base, [adapter], AdapterError, part)
    save_file(held | {A: held[A][:, :2].contiguous()}, config.with_name("adapter_model.safetensors"))
    refused(base, [adapter], ShapeMismatchError, "experts.down_proj")
    save_file(
        held | {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(8)}, config.with_name("adapter_model.safetensors")
    )
    refused(base, [adapter], AdapterError, "experts has lora_A, lora_B, lora_magnitude_vector, expected lora_A and lora_B")


def test_what_is_known_before_a_base_is_there(tmp_path: Path) -> None:
    """For `inspect`: the number of experts follows from the rank that is configured."""
    _, adapter = built(tmp_path, gate_up_proj=(3, 6, 8), down_proj=(3, 8, 3))
    modules = lorafold.load_adapter(adapter).modules
    assert list(modules) == [f"experts.{name}[{e}]" for name in ("gate_up_proj", "down_proj") for e in range(3)]
    assert modules["experts.down_proj[2]"].shape == (8, 3)


def test_equal_updates_of_experts_are_shown_once(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, gate_up_proj=(3, 6, 8), down_proj=(3, 8, 3))
    assert str(lorafold.plan(base, [adapter]).summary(everything=True)).count("× 1.5 (lora_alpha 6 / r 4), 3 times") == 2
    shown = [line.split() for line in str(lorafold.inspect(adapter)).splitlines()]
    assert [line[:2] for line in shown if len(line) > 1 and "[*]" in line[1]] == [
        ["3", "experts.gate_up_proj[*]"], ["3", "experts.down_proj[*]"]
    ]  # fmt: skip

"""Every tensor of an adapter is in the plan and the receipt: in base tensors, with factor and reason, or left out with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorafold
import models
from lorafold.adapters.adapter import WeightedAdapter
from lorafold.errors import PlanError
from lorafold.planning.make import make_plan
from lorafold.planning.plan import plan_from_json, plan_to_json
from models import plain_adapter, plain_base, save_adapter, save_base, tensors

PREFIX = "base_model.model."


def places(plan: lorafold.MergePlan) -> dict[str, list[str]]:
    """The base tensors that each tensor of the first adapter went into."""
    found: dict[str, list[str]] = {}
    for step in plan.steps:
        names = [name for addend in step.addends for name in addend.stored]
        names += [new.values for new in step.rows] + ([step.replacement] if step.replacement is not None else [])
        for name in names:
            found.setdefault(name, []).append(step.tensor)
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"},
    ],
)
def test_each_tensor_has_its_place(tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_base(models.llama(bias=True), tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    plan, held = report.plan, tensors(adapter)
    found, left_out = places(plan), plan.adapters[0].left_out
    assert found.keys() | left_out.keys() == held.keys()
    assert not found.keys() & left_out.keys()
    for name, where in found.items():
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        bias = name.endswith("lora_B.bias")
        assert len(where) == 1
        assert not module or where[0] == f"{module}.{'bias' if bias else 'weight'}"
    assert left_out == {name: "it holds the base's own numbers" for name in held if name.endswith("base_layer.weight")}
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan

    receipt = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert receipt["adapters"][0]["left_out"] == left_out
    said: dict[str, str] = {}
    for entry in receipt["tensors"].values():
        for update in entry.get("updates", ()):
            said |= dict.fromkeys(update["tensors"], update["why"])
        said |= {each["tensor"]: "rows" for each in entry.get("rows", ())} | ({entry["tensor"]: ""} if "tensor" in entry else {})
    assert said.keys() == found.keys()
    if "rank_pattern" in config:
        assert said[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"] == (
            "lora_alpha 6 / √r 2 (rank_pattern 'q_proj'), rsLoRA"
        )
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()


def test_what_the_base_has_no_place_for(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter", modules=("q_proj", "v_proj", "o_proj"))
    plan = lorafold.plan(base, [adapter], allow_partial=True)
    lost = [f"{PREFIX}model.layers.{i}.o_proj.lora_{each}.weight" for i in (0, 1) for each in "AB"]
    assert dict(plan.adapters[0].left_out) == dict.fromkeys(lost, "the base has no place for it")


def test_a_reader_that_forgets_a_tensor_is_found_out(tmp_path: Path) -> None:
    base, path = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    adapter = lorafold.load_adapter(path)
    modules = {name: module for name, module in adapter.modules.items() if "layers.1.v_proj" not in name}
    forgetful = WeightedAdapter(replace(adapter, modules=modules))
    with pytest.raises(PlanError, match=r"layers\.1\.v_proj\.lora_A\.weight' is used nowhere, and nothing says why"):
        make_plan(lorafold.open_checkpoint(base), [forgetful])


def test_factors_that_are_tensors(tmp_path: Path) -> None:
    """kohya's alphas are numbers of one element each."""
    from safetensors.torch import save_file

    base = plain_base(tmp_path / "base", modules=("q_proj",))
    held = {f"lora_unet_model_layers_{i}_q_proj.{part}": tensor for i in (0, 1) for part, tensor in (
        ("lora_down.weight", torch.ones(2, 8)), ("lora_up.weight", torch.ones(8, 2)), ("alpha", torch.tensor(1.0)))}  # fmt: skip
    save_file(held, tmp_path / "kohya.safetensors")
    left_out = lorafold.plan(base, [tmp_path / "kohya.safetensors"]).adapters[0].left_out
    assert left_out == {f"lora_unet_model_layers_{i}_q_proj.alpha": "its number is in the factor of its module" for i in (0, 1)}

"""Variants whose files need more than names: attention's factor by version, pooled inputs, what only training needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AdapterError, PlanError, UnsupportedAdapterError
from models import different, edit_json, edit_tensors, refused, save_adapter
from oracle import correctly_rounded, same_bits

CONFIG = "adapter_config.json"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.lin = nn.MultiheadAttention(8, 2), nn.Linear(8, 12)


def built(path: Path, **config: Any) -> tuple[Path, Path]:
    torch.manual_seed(6)
    base, model = path / "base", Small()
    base.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    return base, save_adapter(model, path / "adapter", **config)


@pytest.mark.parametrize(
    ("version", "given", "factor", "why"),
    [
        ("0.21.2", None, 2, "times 2 as PEFT 0.21.2 trained attention's out_proj"),
        ("0.14.0", None, 2, "times 2 as PEFT 0.14.0"),
        ("0.21.2.dev0@UNKNOWN", None, 2, "times 2 as PEFT 0.21.2.dev0@UNKNOWN"),
        (None, None, 2, "times 2 as PEFT trained attention's out_proj (no peft_version)"),
        ("0.22.0", 1, 1, "times 1 as given"),
        ("0.22.0", 2, 2, "times 2 as given"),
        ("0.21.2", 1, 1, "times 1 as given"),
        ("0.22.0", None, None, "out_proj_factor=…"),
        ("0.21.3.dev0", None, None, "PEFT up to 0.21.2 added its update twice"),
    ],
)
def test_the_factor_of_attentions_output(tmp_path: Path, version: str | None, given: Any, factor: int | None, why: str) -> None:
    base, adapter = built(tmp_path, target_modules=["attn"])
    edit_json(adapter / CONFIG, peft_version=version)
    options = ReadOptions(out_proj_factor=given)
    if factor is None:
        refused(base, [adapter], UnsupportedAdapterError, "attn.out_proj is the output projection", why, read_options=options)
        return
    plan = lorafold.plan(base, [adapter], read_options=options)
    scalings = {addend.module: (addend.scaling, addend.why) for step in plan.steps for addend in step.addends}
    assert scalings["attn"] == (1.5, "lora_alpha 6 / r 4")
    assert scalings["attn.out_proj"] == (
        1.5 * factor,
        f"lora_alpha 6 / r 4, {why}" if given or not version else scalings["attn.out_proj"][1],
    )
    assert why in scalings["attn.out_proj"][1]


def test_attention_with_a_bias_of_its_own(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, target_modules=["attn"], lora_bias=True)
    refused(base, [adapter], UnsupportedAdapterError, "attn.out_proj is attention's output projection with a lora_bias")


def test_a_linear_layer_that_is_called_out_proj_has_no_factor(tmp_path: Path) -> None:
    """One that lies in a module of which a parameter was trained: wrapped, but no MultiheadAttention."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scan, self.out_proj = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()

    model = Model()
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "mamba"}')
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["out_proj"], target_parameters=["mixer.scan"])
    names = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.mixer.base_layer.out_proj.lora_A.weight" in names
    plan = lorafold.plan(base, [adapter])
    assert {step.tensor: step.addends[0].scaling for step in plan.steps if step.addends} == {
        "mixer.scan": 1.5, "mixer.out_proj.weight": 1.5
    }  # fmt: skip


@pytest.mark.parametrize("group", [2, 4, 8])
def test_pooled_inputs_of_qalora(tmp_path: Path, group: int) -> None:
    """What PEFT's QA-LoRA computes for a layer of GPTQ, on a base that is not quantised any more."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    class Layer:
        training, in_features = False, 8

    base, adapter = built(tmp_path, target_modules=["lin"], use_qalora=True, qalora_group_size=group)
    names = [f"base_model.model.lin.lora_{each}.weight" for each in "AB"]
    edit_tensors(adapter, lambda held: {names[0]: torch.randn(4, 8 // group), names[1]: held[names[1]]})
    A, B = (load_file(adapter / "adapter_model.safetensors")[name] for name in names)
    layer = Layer()
    layer.lora_A, layer.lora_B = {"a": nn.Linear(8 // group, 4)}, {"a": nn.Linear(4, 12)}  # type: ignore[attr-defined]
    layer.lora_A["a"].weight.data, layer.lora_B["a"].weight.data = A.double(), B.double()  # type: ignore[attr-defined]
    layer.lora_dropout, layer.scaling = {"a": nn.Identity()}, {"a": 1.5}  # type: ignore[attr-defined]
    layer.qalora_group_size = {"a": group}  # type: ignore[attr-defined]
    x = torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        theirs = QALoraLinearVariant.forward(layer, "a", x, torch.zeros(8, 12, dtype=torch.float64)).T

    report = lorafold.merge(base, [adapter], tmp_path / "out", dtype="F64")
    held = load_file(base / "model.safetensors")["lin.weight"]
    merged = load_file(tmp_path / "out" / "model.safetensors")["lin.weight"]
    groups = 8 // group
    ours = lorafold.LowRankUpdate(A.double().repeat_interleave(group, 1), B.double(), 1.5 * groups / group)
    assert same_bits(merged, correctly_rounded(held, [ours], torch.float64))
    assert torch.allclose(merged, held.double() + theirs, rtol=0, atol=1e-13)  # sums of 4 products below 10, in another order
    (addend,) = (addend for step in report.plan.steps for addend in step.addends)
    assert addend.scaling == 1.5 * groups / group
    assert f"times {groups} groups / {group} inputs in each (QA-LoRA)" in addend.why
    edit_json(adapter / CONFIG, qalora_group_size=1)
    refused(base, [adapter], UnsupportedAdapterError, "lin: with a qalora_group_size of 1 nothing tells")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("velora", ["base_model.model.lin.lora_velora_embed"]),
        ("monteclora", [f"base_model.model.lin.lora_monteclora_sampler.{each}" for each in ("expert_weights", "std_prior")]),
    ],
)
def test_what_only_training_needs_is_named(tmp_path: Path, kind: str, names: list[str]) -> None:
    from peft.tuners.lora import config as kinds

    made = {"velora": kinds.VeloraConfig(num_groups=2), "monteclora": kinds.MontecloraConfig(num_samples=2)}[kind]
    base, adapter = built(tmp_path, target_modules=["lin"], **{f"{kind}_config": made})
    left_out = lorafold.load_adapter(adapter).left_out
    assert set(names) <= left_out.keys()
    assert all("only training needs it" in why for why in left_out.values())
    notes = "\n".join(lorafold.plan(base, [adapter]).notes)
    assert "not merged, since only training needs it" in notes
    assert names[0].rpartition(".")[0] in notes

    edit_json(adapter / CONFIG, **{f"{kind}_config": None})
    refused(base, [adapter], UnsupportedAdapterError, "belongs to a kind of adapter that is not supported")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_a_residual_cannot_be_merged_with(tmp_path: Path, init: str) -> None:
    base, adapter = built(tmp_path, target_modules=["lin"], init_lora_weights=init)
    refused(
        base, [(adapter, 0.5)], PlanError, f"lin of adapter was trained on what {init} left of lin.weight", "must be 1, not 0.5"
    )
    twin = save_adapter(Small(), tmp_path / "twin", seed=8, target_modules=["lin"], init_lora_weights=init)
    refused(base, [adapter, twin], PlanError, "lin.weight is changed twice, the second time by lin of twin")
    plain = save_adapter(Small(), tmp_path / "plain", seed=9, target_modules=["lin"])
    lorafold.merge(base, [adapter, plain], tmp_path / "one")
    lorafold.merge(base, [plain, adapter], tmp_path / "two")
    assert different(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))) == {}
    plan = lorafold.plan(base, [adapter])
    assert [a.why for step in plan.steps for a in step.addends] == [f"lora_alpha 6 / r 4, on what {init} left of the weight"]
    note = "\n".join(plan.notes)
    assert "trained on what was left of the base weights: that is computed anew, and rounded to the base's dtype" in note
    with pytest.raises(UnsupportedAdapterError, match="a model in memory has all of it"):
        lorafold.nn.load_adapter_into(Small(), adapter)


def test_a_residual_takes_memory_that_is_accounted_for(tmp_path: Path) -> None:
    from lorafold.engine.residual import nbytes_needed
    from lorafold.errors import InputError

    _, adapter = built(tmp_path, target_modules=["lin"], init_lora_weights="pissa")
    large = tmp_path / "large"
    large.mkdir()
    names = [f"base_model.model.lin.lora_{each}.weight" for each in "AB"]
    held = load_file(adapter / "adapter_model.safetensors")
    edit_tensors(adapter, lambda _: {names[0]: held[names[0]].repeat(1, 128), names[1]: held[names[1]].repeat(90, 1)})
    save_file({"lin.weight": torch.randn(1080, 1024)}, large / "model.safetensors")
    (large / "config.json").write_text("{}")
    assert nbytes_needed(1080, 1024, 4) > 60_000_000
    with pytest.raises(InputError, match=r"'lin\.weight' needs \d+ bytes of memory, more than `max_memory=90000000`"):
        lorafold.merge(large, [adapter], tmp_path / "out", max_memory=90_000_000)


def test_a_part_of_kasa_that_is_missing(tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    base, adapter = built(tmp_path, target_modules=["lin"], kasa_config=KasaConfig())
    name = "base_model.model.lin.lora_diag"
    edit_tensors(adapter, lambda held: held | {name: held[name][:-1].clone()})
    refused(base, [adapter], AdapterError, "lora_diag must be [4], found [3]")
    edit_json(adapter / CONFIG, kasa_config=None)
    refused(base, [adapter], AdapterError, "kasa_config is not set, but lora_diag is there")
    edit_json(adapter / CONFIG, kasa_config={}, init_lora_weights="pissa")
    refused(base, [adapter], UnsupportedAdapterError, "kasa_config beside init_lora_weights 'pissa'")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_residual_in_a_model_in_memory(tmp_path: Path, init: str) -> None:
    """The bits of merged files, and the base's after."""
    base, adapter = built(tmp_path, target_modules=["lin"], init_lora_weights=init)
    lorafold.merge(base, [adapter], tmp_path / "out")
    model, held = Small(), load_file(base / "model.safetensors")
    model.load_state_dict(held)
    with lorafold.merge_into(model, [adapter]):
        assert different(dict(model.state_dict()), load_file(tmp_path / "out" / "model.safetensors")) == {}
    assert different(dict(model.state_dict()), held) == {}


def test_undoing_a_residual(tmp_path: Path) -> None:
    base, adapter = built(tmp_path, target_modules=["lin"], init_lora_weights="pissa")
    lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", undo=tmp_path / "undo")
    again, held = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "base"))
    assert different(again, held) == {}

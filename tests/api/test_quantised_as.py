"""A base of floats that training quantised when it loaded it: the merge begins from the weights that the adapter was trained on.

What those are is for `tests/checkpoints/encodings/test_on_the_fly.py`; here that is taken as given, and what becomes of it is held
to fractions.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorafold
from lorafold.checkpoints.encodings.on_the_fly import on_the_fly
from lorafold.errors import CheckpointError, LorafoldError, PlanError, UnsupportedAdapterError
from lorafold.files.evaluation import evaluate
from lorafold.planning import linear_layers
from models import edit_json, gpt2, llama, save_adapter, save_base
from oracle import correctly_rounded, same_bits
from quantised import Fp8Llama, raw, updates_in, whole

KINDS = ("nf4", "nf4-single", "fp4", "int8")
TARGETS = ["q_proj", "down_proj"]


def seen(base: Path, name: str, kind: str, loaded: str = "BF16", transposed: bool = False) -> Tensor:
    """What training saw of the weight `name`."""
    checkpoint = lorafold.open_checkpoint(base)
    held = {str(file): load_file(file) for file in base.glob("*.safetensors")}

    def read(info: Any) -> Tensor:
        tensor = held[str(info.path)][info.name].contiguous().view(-1)
        first = (info.start - checkpoint.stored[info.name].start) // tensor.itemsize
        return tensor[first : first + info.numel].view(info.shape)

    return evaluate(on_the_fly(checkpoint.stored[name], kind, loaded, transposed=transposed).decoded, read)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_layers_are_as_training_saw_them(tmp_path: Path, kind: Any, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import blocks

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * 32 * 5)
    base = save_base(llama(tied=tied), tmp_path / "base")
    adapter = save_adapter(llama(tied=tied), tmp_path / "adapter", target_modules=TARGETS)
    updates, before = updates_in(adapter), whole(base)
    report = lorafold.merge(base, [adapter], tmp_path / "out", quantised_as=kind, undo=tmp_path / "undo", max_memory="300MB")
    found = whole(tmp_path / "out")
    assert found.keys() == before.keys()
    for name, tensor in found.items():
        if is_linear(name):
            expected = correctly_rounded(seen(base, name, kind), updates.get(name, []), torch.bfloat16)
            assert same_bits(tensor, expected), name
            assert raw(tensor) != raw(before[name])
        else:
            assert raw(tensor) == raw(before[name]), name
    assert (report.plan.count("merge"), report.plan.count("cast")) == (4, 10)
    assert report.proof is not None
    assert lorafold.verify(tmp_path / "out", base, [adapter]).ok
    receipt = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    assert receipt["quantised_as"] == kind
    assert "compute_dtype" not in receipt
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys() >= {"dtype"}
    assert any("on trust" in note for note in report.plan.notes)
    assert "load_in_4bit" in (tmp_path / "out" / "README.md").read_text()
    lorafold.unmerge(tmp_path / "out", tmp_path / "by_base", base=base)
    lorafold.unmerge(tmp_path / "out", tmp_path / "by_undo", undo=tmp_path / "undo")
    for file in base.iterdir():
        for restored in ("by_base", "by_undo"):
            assert (tmp_path / restored / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_conv1d_is_turned_before_it_is_quantised(tmp_path: Path, kind: Any) -> None:
    base, adapter = save_base(gpt2(), tmp_path / "base"), save_adapter(gpt2(), tmp_path / "adapter", target_modules=["c_attn"])
    updates = updates_in(adapter)
    lorafold.merge(base, [adapter], tmp_path / "out", quantised_as=kind)
    for name, tensor in whole(tmp_path / "out").items():
        if any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            numbers = seen(base, name, kind, transposed=True)
            expected = correctly_rounded(numbers, [update.T for update in updates.get(name, [])], torch.bfloat16)
            assert same_bits(tensor, expected), name
        else:
            assert raw(tensor) == raw(whole(base)[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_type_that_training_loaded_must_be_known(tmp_path: Path, dtype: torch.dtype) -> None:
    base = save_base(llama(), tmp_path / "base", dtype)
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=TARGETS)
    with pytest.raises(PlanError, match="the type in which training loaded it decides") as caught:
        lorafold.plan(base, [adapter], quantised_as="nf4")
    assert "`compute_dtype='bf16'`" in str(caught.value.hint)
    name = "model.layers.0.self_attn.q_proj.weight"
    for compute_dtype, loaded in (("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")):
        given: Any = {"quantised_as": "nf4", "compute_dtype": compute_dtype}
        lorafold.merge(base, [adapter], tmp_path / "out", overwrite=True, **given)
        expected = correctly_rounded(seen(base, name, "nf4", loaded), updates_in(adapter)[name], dtype)
        assert same_bits(whole(tmp_path / "out")[name], expected)
    lorafold.merge(base, [adapter], tmp_path / "out", overwrite=True, dtype="bfloat16", **given)
    expected = correctly_rounded(seen(base, name, "nf4", "F32"), updates_in(adapter)[name], torch.bfloat16)
    assert same_bits(whole(tmp_path / "out")[name], expected)


def test_each_plan_and_overlay(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapters = [save_adapter(llama(), tmp_path / name, seed=i, target_modules=TARGETS) for i, name in enumerate(("one", "two"))]
    (tmp_path / "outs").mkdir()
    reports = lorafold.merge_each(base, adapters, tmp_path / "outs", quantised_as="nf4")
    for report, adapter in zip(reports, adapters, strict=True):
        lorafold.merge(base, [adapter], tmp_path / "alone", quantised_as="nf4", overwrite=True)
        one, alone = whole(Path(report.out)), whole(tmp_path / "alone")
        assert all(raw(one[name]) == raw(alone[name]) for name in alone)
    plan = lorafold.plan(base, adapters[1:], quantised_as="nf4")
    assert "bitsandbytes NF4, double quantised, as it was loaded in BF16" in str(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert lorafold.run(tmp_path / "plan.json", tmp_path / "run").plan == plan
    lorafold.merge(base, adapters[1:], tmp_path / "some", quantised_as="nf4", only_changed=True)
    some = whole(tmp_path / "some")
    assert some.keys() == {name for name in alone if is_linear(name)}
    assert all(raw(some[name]) == raw(alone[name]) for name in some)


@pytest.mark.parametrize("architecture", ["LlamaForSequenceClassification", "LlamaModel"])
def test_heads_and_last_modules_are_left_alone(tmp_path: Path, architecture: str) -> None:
    """As transformers does it: the last parameter's module stays, which of a headless model is its norm."""
    base = save_base(llama(architecture), tmp_path / "base")
    found = linear_layers.linear_layers(lorafold.open_checkpoint(base))
    assert found.names == {name for name in whole(base) if is_linear(name)}


def test_a_head_of_the_model_may_be_missing(tmp_path: Path) -> None:
    """A base that was saved without its head's prefix has the names of the inner model."""
    base = save_base(gpt2().transformer, tmp_path / "base")
    edit_json(base / "config.json", architectures=["GPT2LMHeadModel"])
    found = linear_layers.linear_layers(lorafold.open_checkpoint(base))
    assert len(found.names) == 8
    assert all(name.startswith("h.") for name in found.names)


def refused(base: Path, adapter: Path, out: Path, kind: type[LorafoldError], words: str, **options: Any) -> LorafoldError:
    with pytest.raises(kind, match=words) as caught:
        lorafold.merge(base, [adapter], out, **{"quantised_as": "nf4", **options})
    assert not out.exists()
    return caught.value


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter, out = save_adapter(llama(), tmp_path / "adapter", target_modules=TARGETS), tmp_path / "out"
    refused(base, adapter, out, PlanError, "is for a quantised base", output_format="bf16")
    refused(base, adapter, out, PlanError, "but not as what", quantised_as=None, compute_dtype="bf16")
    case = Fp8Llama(tmp_path / "fp8")
    refused(case.base, case.adapter, out, PlanError, "is quantised already")
    pissa = save_adapter(llama(), tmp_path / "pissa", target_modules=TARGETS, init_lora_weights="pissa_niter_4")
    with pytest.raises(LorafoldError):
        lorafold.merge(base, [pissa], out, quantised_as="nf4")
    olora = save_adapter(llama(), tmp_path / "olora", target_modules=TARGETS, init_lora_weights="olora")
    refused(base, olora, out, UnsupportedAdapterError, "nothing tells")
    other = tmp_path / "other"
    shutil.copytree(base, other)
    edit_json(other / "config.json", architectures=["NobodysModel"])
    refused(other, adapter, out, PlanError, "NobodysModel are quantised in training is not known")
    edit_json(other / "config.json", architectures=["LlamaForCausalLM"], num_hidden_layers=3)
    refused(other, adapter, out, CheckpointError, "has the linear layer 'model.layers.2")
    edit_json(other / "config.json", num_hidden_layers=2, intermediate_size=24)
    refused(other, adapter, out, CheckpointError, r"expected floats of \[24, 32\]")
    edit_json(other / "config.json", hidden_size=7)
    refused(other, adapter, out, PlanError, "cannot build LlamaForCausalLM")
    (other / "config.json").unlink()
    refused(other, adapter, out, PlanError, "has no config.json")

    def absent(name: str) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(linear_layers, "import_module", absent)
    error = refused(base, adapter, out, PlanError, "it is not installed")
    assert "pip install" in str(error.hint)


def test_not_for_a_model_in_memory() -> None:
    with pytest.raises(TypeError, match="merge_into"):
        lorafold.merge_into(llama(), [], quantised_as="nf4")  # type: ignore[call-arg]

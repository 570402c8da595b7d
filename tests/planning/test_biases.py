"""A lora_bias on layers without a bias: what PEFT computes and does not merge, against its own forward."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lorafold
from lorafold import nn as lnn
from lorafold.errors import LayerError, PlanError, UnmatchedAdapterError
from models import edit_json, llama, peft_model, save_adapter, save_base, tensors

TOKENS = torch.arange(20).view(2, 10)
TABLE = json.loads((Path(lorafold.__file__).parent / "planning" / "biases.json").read_text())
SCRIPTS = Path(__file__).parents[2] / "scripts"


def loaded(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model at `path`, and what transformers says of its names."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)  # type: ignore


@pytest.mark.parametrize(
    ("targets", "fields", "zeros"),
    [
        (["q_proj", "v_proj"], ["attention_bias"], ["k_proj", "o_proj"]),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ["attention_bias"], []),
        (["o_proj", "down_proj"], ["attention_bias", "mlp_bias"], ["q_proj", "up_proj"]),
    ],
)
def test_files_have_them_and_the_field_that_asks_for_them(
    tmp_path: Path, targets: list[str], fields: list[str], zeros: list[str]
) -> None:
    """float32 sums of some dozens of terms of size 1, in another order: 1e-4 is a hundred times what that can be."""
    base = save_base(llama(), tmp_path / "base", torch.float32)
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=targets, lora_bias=True)
    report = lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    assert report.plan.config == dict.fromkeys(fields, True)
    assert any("which lora_bias trained" in note for note in report.plan.notes)
    model, said = loaded(tmp_path / "out")
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    theirs = peft_model(base, adapter, "LlamaForCausalLM")(TOKENS).logits
    assert torch.allclose(model(TOKENS).logits, theirs, rtol=1e-4, atol=1e-4)
    biases = {name: value for name, value in tensors(tmp_path / "out").items() if name.endswith(".bias")}
    assert {name.split(".")[-2] for name in biases} >= {*targets, *zeros}
    assert all(bool(value.any()) == (name.split(".")[-2] in targets) for name, value in biases.items())
    assert lorafold.verify(tmp_path / "out", base, [adapter]).ok
    lorafold.unmerge(tmp_path / "out", tmp_path / "again", base=base)
    lorafold.unmerge(tmp_path / "out", tmp_path / "undone", undo=tmp_path / "undo")
    for restored in ("again", "undone"):
        for file in base.iterdir():
            assert (tmp_path / restored / file.name).read_bytes() == file.read_bytes()


def test_bits_do_not_depend_on_files_and_memory(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj", "down_proj"], lora_bias=True)
    lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out", max_shard_size=10_000)
    (tmp_path / "each").mkdir()
    lorafold.merge_each(base, [adapter], tmp_path / "each")
    model, _ = loaded(base)
    model.bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = tensors(tmp_path / "out")
    with lorafold.merge_into(model, [(adapter, 0.5)]) as merged:
        found = model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in held.items() if name in found)
        assert {name for name in held if name not in found and not held[name].any()} == held.keys() - found.keys()
        assert "model.layers.1.mlp.down_proj.bias" in merged.kept
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("bias" in name for name in held.keys() - before.keys())
    assert tensors(tmp_path / "each" / "adapter").keys() == held.keys()


def test_an_output_of_changed_tensors_alone_cannot_say_it(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(PlanError, match=r"attention_bias of config\.json would change"):
        lorafold.plan(base, [adapter], only_changed=True)


def test_nothing_is_guessed(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    edit_json(base / "config.json", architectures=["LlamaOfMyOwn"])
    with pytest.raises(UnmatchedAdapterError, match=r"q_proj\.bias to add it to") as raised:
        lorafold.plan(base, [adapter])
    assert "merge_into" in str(raised.value)
    edit_json(base / "config.json", architectures=["LlamaForCausalLM"], auto_map={"AutoModel": "modeling.Llama"})
    with pytest.raises(UnmatchedAdapterError):
        lorafold.plan(base, [adapter])
    other = save_adapter(llama(), tmp_path / "other", target_modules=["q_proj", "lm_head"], lora_bias=True)
    edit_json(base / "config.json", auto_map=None)
    with pytest.raises(UnmatchedAdapterError):
        lorafold.plan(base, [other])  # no field gives a Llama's head a bias


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, bias=False)
        self.two = nn.Linear(6, 5, bias=False)
        self.three = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x)))


def wrapped() -> tuple[nn.Module, Any]:
    import peft

    torch.manual_seed(0)
    model = Layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it cannot merge them
        settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two", "three"], lora_bias=True)
        theirs = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_()
    return model, theirs


def test_a_model_of_peft() -> None:
    """As the first test: PEFT itself refuses to merge these."""
    _, theirs = wrapped()
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        theirs.merge_and_unload()
    _, theirs = wrapped()
    x = torch.randn(3, 2, 8, 8)
    wanted = theirs(x)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    with lnn.merged(theirs):
        assert theirs.base_model.model.two.bias is not None
        assert torch.allclose(theirs(x), wanted, rtol=1e-4, atol=1e-4)
    after = theirs.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.warns(lorafold.LorafoldWarning, match=r"one\.bias and 1 more"):
        names = [name for name, _ in lnn.iter_merged(theirs)]
    assert names.count("one.bias") == names.count("two.bias") == 1


def test_merges_over_a_bias_that_a_merge_gave_come_out_first(tmp_path: Path) -> None:
    _, theirs = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "one")
        with torch.no_grad():
            theirs.base_model.model.two.lora_A["default"].weight.mul_(2)
        theirs.save_pretrained(tmp_path / "two")
    model = Layers()
    first = lorafold.merge_into(model, [tmp_path / "one"])
    given = model.two.bias
    value = given.detach().clone()
    second = lorafold.merge_into(model, [tmp_path / "two"])
    assert model.two.bias is given
    assert not torch.equal(given, value)
    with pytest.raises(LayerError, match="unmerge that first"):
        first.unmerge()
    second.unmerge()
    assert model.two.bias is given
    assert torch.equal(given, value)
    model.two.bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(LayerError, match="another tensor"):
        first.unmerge()
    model.two.bias = given
    first.unmerge()
    assert model.one.bias is model.two.bias is None
    assert model.three.bias is not None


def test_modules_that_take_none_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = OwnLinear(6, 5, bias=False)
            self.one, self.three = nn.Conv2d(2, 4, 3, bias=False), nn.Linear(5, 5)

    class OwnLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    _, theirs = wrapped()
    with pytest.raises(UnmatchedAdapterError, match=r"two\.bias"):
        lorafold.merge_into(Own(), [theirs])


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen3Model", "LlavaForConditionalGeneration", "Starcoder2ForCausalLM", "ViTModel"]
)
def test_the_table_is_what_transformers_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("make_biases", SCRIPTS / "make_biases.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_biases", script)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(script)
        made = script.table([getattr(transformers, name)])
    assert made["models"][0] == TABLE["models"][TABLE["classes"][name]]

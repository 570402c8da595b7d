"""What PEFT trains and saves of its own accord: names that are longer than the model, ends saved unasked, wrappers, attention."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold import ReadOptions
from lorafold.errors import AdapterError, AmbiguousNameError, UnmatchedAdapterError
from models import (
    different,
    edit_json,
    edit_tensors,
    llama,
    plain_adapter,
    plain_base,
    refused,
    rewritten,
    save_adapter,
    save_base,
    tensors,
)  # fmt: skip

PREFIX = "base_model.model."


class Attention(nn.Module):
    """A MultiheadAttention after a Conv1D, or before it."""

    def __init__(self, after: bool = True) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        made = {"c_fc": Conv1D(12, 8), "attn": nn.MultiheadAttention(8, 2, batch_first=True)}
        for name in made if after else reversed(made):
            setattr(self, name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.c_fc(x + self.attn(x, x, x, need_weights=False)[0])


def on_disk(model: nn.Module, path: Path) -> Path:
    path.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


def unmerged(model: nn.Module, adapter: Path, x: Tensor) -> Tensor:
    import peft

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter, autocast_adapter_dtype=False)
        return loaded.double().eval()(x)  # type: ignore[no-any-return]


PATTERNS = [
    {},
    {"alpha_pattern": {"attn": 32}},
    {"alpha_pattern": {"out_proj": 32}},
    {"rank_pattern": {"attn": 2}, "use_rslora": True},
]


@pytest.mark.parametrize("patterns", PATTERNS)
def test_attention_takes_its_pattern_for_both_projections(tmp_path: Path, patterns: dict[str, Any]) -> None:
    """In float64, to 2⁻⁴⁰ of the output: PEFT sums in another order."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(8, 2, batch_first=True))
    base = on_disk(model.double(), tmp_path / "base")
    adapter = save_adapter(copy.deepcopy(model), tmp_path / "adapter", target_modules=["attn"], **patterns)
    lorafold.merge(base, [adapter], tmp_path / "out")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    import peft

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter, autocast_adapter_dtype=False).double()
        wanted = wanted.base_model.model.attn(x, x, x, need_weights=False)[0]
        model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
        found = model.attn(x, x, x, need_weights=False)[0]  # type: ignore[operator]
    assert (found - wanted).abs().max() <= 2.0**-40 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_attention_after_a_conv1d_is_asked_for_and_then_as_peft_has_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention().double()
    base = on_disk(model, tmp_path / "base")
    adapter = save_adapter(copy.deepcopy(model), tmp_path / "adapter", target_modules=["attn", "c_fc"])
    refused(base, [adapter], AmbiguousNameError, "attn.out_proj is attention's output projection", "fan_in_fan_out")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    wanted = unmerged(model, adapter, x)
    results = {}
    for turned in (True, False):
        out = tmp_path / str(turned)
        lorafold.merge(base, [adapter], out, read_options=ReadOptions(fan_in_fan_out=turned))
        merged = Attention().double()
        merged.load_state_dict(load_file(out / "model.safetensors"))
        with torch.no_grad():
            results[turned] = float((merged(x) - wanted).abs().max() / wanted.abs().max())
    assert results[True] <= 2.0**-40
    assert results[False] > 1e-3


class Squares(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.fc, self.c_attn = nn.Linear(8, 8), Conv1D(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(self.fc(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_a_square_linear_beside_a_conv1d(tmp_path: Path) -> None:
    """In files nothing tells of it, in memory its class does; a model_type that transformers knows does too."""
    torch.manual_seed(0)
    model = Squares().double()
    base = on_disk(model, tmp_path / "base")
    adapter = save_adapter(copy.deepcopy(model), tmp_path / "adapter", target_modules=["fc", "c_attn"])
    x = torch.randn(2, 8, dtype=torch.float64)
    wanted = unmerged(model, adapter, x)
    refused(base, [adapter], AmbiguousNameError, "fc is for fc.weight, a square weight of a model that is not known")
    edit_json(base / "config.json", model_type="somebody_elses")
    refused(base, [adapter], AmbiguousNameError, "fc is for fc.weight, a square weight of a model that is not known")
    lorafold.merge(base, [adapter], tmp_path / "out", read_options=ReadOptions(fan_in_fan_out=True))
    told = load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        assert not torch.allclose(x @ told["fc.weight"].T, x @ model.fc.weight.T)
    live = copy.deepcopy(model)
    with lorafold.merge_into(live, [adapter]), torch.no_grad():
        assert (live(x) - wanted).abs().max() <= 2.0**-40 * wanted.abs().max()
    edit_json(base / "config.json", model_type="gpt2")
    lorafold.merge(base, [adapter], tmp_path / "known")
    model.load_state_dict(load_file(tmp_path / "known" / "model.safetensors"))
    with torch.no_grad():
        assert (model(x) - wanted).abs().max() <= 2.0**-40 * wanted.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_resized_vocabulary_that_peft_saves_unasked(tmp_path: Path, tied: bool, targets: Any) -> None:
    import peft
    import transformers

    base = save_base(llama(tied=tied), tmp_path / "base", torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(56, mean_resizing=False)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=targets)
    held = load_file(adapter / "adapter_model.safetensors")
    assert f"{PREFIX}model.embed_tokens.weight" in held
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert any("PEFT saves both ends" in note for note in report.plan.notes)
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = transformers.LlamaForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(56, mean_resizing=False)
    ids = torch.tensor([[1, 5, 50, 55]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.PeftModel.from_pretrained(again, adapter).eval()(ids).logits
        assert found.config.vocab_size == 56
        assert (found(ids).logits - wanted).abs().max() <= 2.0**-16 * wanted.abs().max()


def test_the_biased_head_that_peft_saves_beside_lora(tmp_path: Path) -> None:
    """A copy is left out with the reason; one that is no copy replaces, as PEFT loads it."""
    import transformers

    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    base = save_base(model, tmp_path / "base", torch.float32)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    bias = f"{PREFIX}lm_head.base_layer.bias"
    assert bias in load_file(adapter / "adapter_model.safetensors")
    plan = lorafold.plan(base, [adapter])
    assert plan.adapters[0].left_out[bias] == "it holds the base's own numbers"
    assert {step.tensor: step.action for step in plan.steps}["lm_head.bias"] == "copy"
    edit_tensors(adapter, lambda held: held | {bias: held[bias] + 1})
    assert {step.tensor: step.action for step in lorafold.plan(base, [adapter]).steps}["lm_head.bias"] == "replace"


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj", "query_key_value", "Wqkv"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_names_of_which_nothing_was_to_be_adapted(tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_base(llama(), tmp_path / "base", torch.float32)
    adapter = save_adapter(llama(), tmp_path / "adapter", **config)
    whole = lorafold.plan(base, [adapter])
    assert whole.count("merge") == len([n for n in load_file(adapter / "adapter_model.safetensors") if "lora_A" in n])
    lost = rewritten(adapter, tmp_path / "lost", rename=lambda name: None if "q_proj" in name else name)
    edit_tensors(lost, lambda held: held | {f"{PREFIX}model.layers.0.self_attn.k_proj.lora_{x}.weight": torch.ones(s)
                                            for x, s in (("A", (4, 32)), ("B", (16, 4)))})  # fmt: skip
    refused(base, [lost], AdapterError, "target_modules", "q_proj", "tensors were lost")


@pytest.mark.parametrize("around", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"])
def test_wrappers_anywhere_in_a_name(tmp_path: Path, around: str) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    lorafold.merge(base, [adapter], tmp_path / "plain")
    wrapped = rewritten(
        adapter,
        tmp_path / "wrapped",
        rename=lambda name: name.replace("layers.0.", f"layers.0.{around}.").replace("layers.", f"{around}.layers."),
    )
    report = lorafold.merge(base, [wrapped], tmp_path / "out")
    assert different(tensors(tmp_path / "out"), tensors(tmp_path / "plain")) == {}
    assert any(f"{around} taken out" in note for note in report.plan.notes)
    rules = ((f"{around}.layers", "layers"),) if around != "module" else ()
    assert lorafold.plan(base, [wrapped], read_options=ReadOptions(renames=rules)).count("merge") == 4


def test_a_key_that_is_none_of_pefts_is_refused(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    name = f"{PREFIX}model.layers.0.q_proj.lora_A.weight"
    held = load_file(adapter / "adapter_model.safetensors")
    for wrong in (name.replace("weight", "weixht"), name.replace("weight", "other.weight"), name.replace("weight", "weight.x")):
        edit_tensors(adapter, lambda _, wrong=wrong: {wrong if n == name else n: t for n, t in held.items()})
        refused(base, [adapter], AdapterError, wrong)
    edit_tensors(adapter, lambda _: {n.replace(".weight", ".default.weight"): t for n, t in held.items()})
    assert lorafold.plan(base, [adapter]).count("merge") == 4


def test_a_head_that_the_base_lacks_comes_with_the_way_to_have_it(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(
        llama("LlamaForSequenceClassification"), tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS"
    )
    refused(base, [adapter], UnmatchedAdapterError, "holds that head whole", "AutoModelForSequenceClassification", "num_labels=3")
    with_head = save_base(llama("LlamaForSequenceClassification"), tmp_path / "with head")
    assert lorafold.plan(with_head, [adapter]).count("replace") == 1


def test_experts_under_unsloths_names_and_in_stacks(tmp_path: Path) -> None:
    """gpt-oss with a layer for each expert, and factors that are stacked by expert, are the update of the stack."""
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 12)  # (experts, in, out)
    (tmp_path / "base").mkdir()
    save_file({"model.layers.0.mlp.experts.gate_up_proj": stack}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt_oss"}')
    a, b = torch.randn(3, 2, 8), torch.randn(3, 12, 2)
    around = f"{PREFIX}model.layers.0.mlp.experts"
    single = {
        f"{around}.gate_up_projs.{e}.lora_{part}.weight": held[e].clone() for e in range(3) for part, held in (("A", a), ("B", b))
    }
    stacked = {f"{around}.gate_up_proj.lora_A.weight": a, f"{around}.gate_up_proj.lora_B.weight": b}
    wanted = (stack.double() + 2 * (b.double() @ a.double()).transpose(1, 2)).float()
    for name, held in (("single", single), ("stacked", stacked)):
        adapter = plain_adapter(tmp_path / name, target_modules=None)
        save_file(held, adapter / "adapter_model.safetensors", {"format": "pt"})
        lorafold.merge(tmp_path / "base", [adapter], tmp_path / f"{name} out")
        found = load_file(tmp_path / f"{name} out" / "model.safetensors")["model.layers.0.mlp.experts.gate_up_proj"]
        assert torch.equal(found, wanted)

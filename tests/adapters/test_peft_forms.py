"""Every form of PEFT's LoRA that is not a plain linear layer: made by PEFT, perturbed, saved, merged from the files.

The formula in float64 is the oracle (`oracle.correctly_rounded`), PEFT's own merge in float64 the second opinion.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.errors import PlanError, ShapeMismatchError, UnsupportedAdapterError
from lorafold.kernel.rounding import to_nearest
from lorafold.planning.plan import plan_from_json, plan_to_json
from models import save_adapter, save_base, tensors
from oracle import correctly_rounded, same_bits


def save_plain(model: nn.Module, path: Path, dtype: torch.dtype) -> Path:
    """A base of any torch module: its state dict and an empty configuration."""
    path.mkdir()
    save_file({name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 10, (3, 5), stride=2, bias=False)
        self.pointwise = nn.Conv2d(10, 12, 1)
        self.three = nn.Conv3d(4, 6, (1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions_of_every_dimension(tmp_path, dtype):
    torch.manual_seed(0)
    base = save_plain(Convs(), tmp_path / "base", dtype)
    held = load_file(base / "model.safetensors")
    model = Convs().double()
    model.load_state_dict({name: value.double() for name, value in held.items()})
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["one", "two", "pointwise", "three"])
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert report.plan.count("merge") == 4
    assert any("dilation" in note for note in report.plan.notes)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in ("one", "two", "pointwise", "three"):
        a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        update = lorafold.LowRankUpdate(a.flatten(1), b.flatten(1), 6 / 4)
        weight = held[f"{name}.weight"]
        expected = correctly_rounded(weight.flatten(1), [update], dtype)
        assert same_bits(merged[f"{name}.weight"].flatten(1), expected)
    assert torch.equal(merged["one.bias"], held["one.bias"])


def test_convolutions_as_peft_merges_them(tmp_path):
    """In float64 both sums are right to 2⁻⁵³ of numbers below 2 in size, over at most R + 1 = 5 terms."""
    import peft

    torch.manual_seed(1)
    model = Convs().double()
    base = save_plain(model, tmp_path / "base", torch.float64)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["one", "two", "pointwise", "three"])
    lorafold.merge(base, [adapter], tmp_path / "out")
    fresh = Convs().double()
    fresh.load_state_dict(load_file(base / "model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(fresh, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (value - theirs[name]).abs().max() <= 5 * 2.0**-52


class Mixed(nn.Module):
    """One of each that DoRA knows."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.embed = nn.Embedding(20, 8)
        self.c_attn = Conv1D(12, 8)

    targets = ("linear", "conv", "embed", "c_attn")


def dora_base(path: Path, dtype: torch.dtype) -> tuple[Path, dict[str, torch.Tensor], nn.Module]:
    """A `Mixed` base saved in `dtype`, its tensors, and the model in float64 with the same numbers."""
    torch.manual_seed(3)
    save_plain(Mixed(), path, dtype)
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    held = load_file(path / "model.safetensors")
    model = Mixed().double()
    model.load_state_dict({name: value.double() for name, value in held.items()})
    return path, held, model


def dora(weight: torch.Tensor, factors: dict[str, torch.Tensor], name: str, strength: float = 1.0) -> torch.Tensor:
    """The formula in float64, with outputs in the first dimension for all but embeddings: m / ‖W + ΔW‖ · (W + ΔW)."""
    part = "lora_embedding_{}" if name == "embed" else "lora_{}.weight"
    a, b = (factors[f"base_model.model.{name}." + part.format(each)].double() for each in "AB")
    magnitude = factors[f"base_model.model.{name}.lora_magnitude_vector"].double().flatten()
    turned = name in ("embed", "c_attn")
    start = (weight.double().T if turned else weight.double()).flatten(1)  # (outputs, …)
    total = start + 6 / 4 * (b.flatten(1) @ a.flatten(1))
    moved = start + strength * (magnitude[:, None] / total.norm(dim=1, keepdim=True) * total - start)
    return (moved.T if turned else moved).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_is_the_formula_rounded_once(tmp_path, dtype, strength):
    """Norms of unmerged numbers in float64. Both sides err by some 2⁻⁵², so that only a tie of the dtype could tell them apart;
    float64 itself, a sum of numbers below 1 in size that may cancel, is compared to 2⁻⁵⁰."""
    base, held, model = dora_base(tmp_path / "base", dtype)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=list(Mixed.targets), use_dora=True, fan_in_fan_out=True)
    report = lorafold.merge(base, [(adapter, strength)], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in Mixed.targets:
        expected = dora(held[f"{name}.weight"], factors, name, strength)
        if dtype == torch.float64:
            assert torch.allclose(merged[f"{name}.weight"], expected, rtol=0, atol=2.0**-50)
        else:
            rounded = to_nearest(expected, dtype)
            assert torch.equal(merged[f"{name}.weight"], rounded)
    assert report.proof is not None
    assert report.proof.share == 1.0


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")  # PEFT has one flag for all layers, and mends it by itself
def test_dora_as_peft_merges_it(tmp_path):
    """In float64, to 2⁻⁴⁴: PEFT takes the norm of an embedding and of a convolution by other sums."""
    import peft

    base, held, model = dora_base(tmp_path / "base", torch.float64)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=list(Mixed.targets), use_dora=True, fan_in_fan_out=True)
    lorafold.merge(base, [adapter], tmp_path / "out")
    fresh = Mixed().double()
    fresh.load_state_dict(held)
    theirs = peft.PeftModel.from_pretrained(fresh, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(value, theirs[name], rtol=2.0**-44, atol=2.0**-50), name


def test_dora_is_refused_by_a_live_model(tmp_path):
    adapter = save_adapter(Mixed(), tmp_path / "adapter", target_modules=["linear"], use_dora=True)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedAdapterError, match="is DoRA, which rescales the weight of linear"):
        lorafold.nn.load_adapter_into(model, adapter)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def llama(tied: bool):
    import transformers

    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=30,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("indices", [[2, 29, 7], {"embed_tokens": [0]}])
def test_trained_token_rows_replace_rows(tmp_path, tied, indices):
    base = save_base(llama(tied), tmp_path / "base")
    adapter = save_adapter(llama(tied), tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=indices)
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    new = load_file(adapter / "adapter_model.safetensors")[name]
    rows = indices if isinstance(indices, list) else indices["embed_tokens"]
    expected = before["model.embed_tokens.weight"].clone()
    expected[rows] = new.bfloat16()
    assert torch.equal(after["model.embed_tokens.weight"], expected)
    assert ("lm_head.weight" in after) is not tied  # a tied head follows, and is still not stored
    if not tied:
        assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is tied
    assert report.plan.count("rows") == 1
    assert plan_from_json(json.loads(json.dumps(plan_to_json(report.plan)))) == report.plan


def test_token_rows_of_two_adapters(tmp_path):
    """Different rows all count; the same row twice is an error, and so is a row with a weight, or beyond the vocabulary."""
    base = save_base(llama(True), tmp_path / "base")
    one, two, three = (
        save_adapter(llama(True), tmp_path / name, target_modules=["q_proj"], trainable_token_indices=rows, seed=seed)
        for name, rows, seed in (("one", [1, 2], 1), ("two", [3], 2), ("three", [2, 4], 3))
    )
    plan = lorafold.plan(base, [one, two])
    assert sorted(index for step in plan.steps for new in step.rows for index in new.indices) == [1, 2, 3]
    with pytest.raises(PlanError, match=r"model\.embed_tokens\.weight is changed twice, the second time by three"):
        lorafold.plan(base, [one, three])
    with pytest.raises(PlanError, match=r"replaces rows of model\.embed_tokens\.weight, so its weight must be 1, not 0\.5"):
        lorafold.plan(base, [(one, 0.5)])
    config = json.loads((one / "adapter_config.json").read_text()) | {"trainable_token_indices": [1, 30]}
    (one / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatchError, match=r"holds rows up to 30 of model\.embed_tokens\.weight, which is \[30, 16\]"):
        lorafold.plan(base, [one])


def test_a_grouped_convolution_is_refused(tmp_path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, groups=2)

    base = save_plain(Grouped(), tmp_path / "base", torch.float32)
    adapter = save_adapter(Grouped(), tmp_path / "adapter", target_modules=["conv"])
    with pytest.raises(UnsupportedAdapterError, match="conv belongs to a convolution in 2 groups"):
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((base / "config.json").read_text()) == {}

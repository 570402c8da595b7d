"""Merging into a model in memory: the bits of the merged files, and the base back, bit for bit, whatever the adapter is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.errors import LayerError, LorafoldError, NonFiniteError, UnmatchedAdapterError, UnsupportedAdapterError
from models import llama, peft_model, save_adapter, save_base, tensors

Tensors = dict[str, torch.Tensor]


class Mixed(nn.Module):
    """What PEFT puts LoRA on, besides a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.embed = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.gate_up_proj, x)


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "linear, convolution, embedding": (Mixed, {"target_modules": ["linear", "conv", "embed"]}),
    "DoRA": (Mixed, {"target_modules": ["linear", "conv", "embed"], "use_dora": True}),
    "trained biases": (Mixed, {"target_modules": ["linear"], "bias": "all"}),
    "lora_bias": (Mixed, {"target_modules": ["linear"], "lora_bias": True}),
    "a module saved whole": (Mixed, {"target_modules": ["linear"], "modules_to_save": ["conv"]}),
    "trained rows": (Mixed, {"target_modules": ["linear"], "trainable_token_indices": {"embed": [1, 5]}}),
    "attention": (Mixed, {"target_modules": ["attention"]}),
    "experts": (WithExperts, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
}


def bits(model: nn.Module) -> Tensors:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_the_merged_files(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kind, settings = CASES[case]
    model = kind().to(dtype)
    base = tmp_path / "base"
    base.mkdir()
    save_file(bits(model), base / "model.safetensors")
    adapter = save_adapter(kind().float(), tmp_path / "adapter", **settings)
    lorafold.merge(base, [(adapter, 1.0)], tmp_path / "out")
    before = bits(model)
    merged = lorafold.merge_into(model, [adapter])
    assert merged.merged
    assert same(bits(model), load_file(tmp_path / "out" / "model.safetensors"))
    assert not same(bits(model), before)
    assert 0 < merged.nbytes <= sum(value.nbytes for value in before.values())
    merged.unmerge()
    assert not merged.merged
    assert same(bits(model), before)
    merged.unmerge()  # once is enough
    assert same(bits(model), before)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter on it."""
    folder = tmp_path_factory.mktemp("live")
    model = llama()
    return save_base(model, folder / "base"), save_adapter(model, folder / "adapter", target_modules=["q_proj", "down_proj"])


def plain(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def test_a_model_of_transformers_answers_as_with_the_adapter_beside_it(road: tuple[Path, Path]) -> None:
    """float32 sums of some dozens of terms of size 1, in another order: 1e-5 is a hundred times what that can be."""
    base, adapter = road
    tokens = torch.arange(10).view(1, 10)
    theirs = peft_model(base, adapter, "LlamaForCausalLM")(tokens).logits
    model = plain(base)
    apart = model(tokens).logits
    with lorafold.merge_into(model, [adapter]) as merged:
        assert torch.allclose(model(tokens).logits, theirs, rtol=1e-4, atol=1e-4)
        assert set(merged.kept) == {step.tensor for step in merged.plan.steps if step.action == "merge"}
    assert torch.equal(model(tokens).logits, apart)


def test_adapters_are_summed_before_the_rounding(road: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = road
    other = save_adapter(llama(seed=3), tmp_path / "other", target_modules=["q_proj"])
    lorafold.merge(base, [(adapter, 0.5), other], tmp_path / "out", rounding="stochastic", seed=4)
    model = plain(base, torch.bfloat16)
    lorafold.merge_into(model, [(adapter, 0.5), other], rounding="stochastic", seed=4)
    held = tensors(tmp_path / "out")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in held.items())


def test_nothing_changes_where_something_is_wrong(road: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = road
    model = plain(base)
    before = bits(model)
    elsewhere = save_adapter(llama(layers=3), tmp_path / "deeper", target_modules=["q_proj"])
    with pytest.raises(UnmatchedAdapterError):
        lorafold.merge_into(model, [elsewhere])
    assert same(bits(model), before)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # found when others are merged already
    before = bits(model)
    with pytest.raises(NonFiniteError, match="down_proj"):
        lorafold.merge_into(model, [adapter])
    assert same(bits(model), before)


def test_tied_weights_that_would_come_apart_are_refused(tmp_path: Path) -> None:
    model = llama(tied=True)
    adapter = save_adapter(llama(tied=True), tmp_path / "adapter", target_modules=["embed_tokens"])
    before = bits(model)
    with pytest.raises(UnsupportedAdapterError, match="nothing was changed"):
        lorafold.merge_into(model, [adapter])
    assert same(bits(model), before)


def test_a_weight_that_became_another_is_not_overwritten(road: tuple[Path, Path]) -> None:
    base, adapter = road
    model = plain(base)
    merged = lorafold.merge_into(model, [adapter])
    model.to(torch.bfloat16)
    now = bits(model)
    with pytest.raises(LayerError, match="turn it back"):
        merged.unmerge()
    assert same(bits(model), now)


def test_a_model_with_layers_of_its_own_for_the_adapter_is_refused(road: tuple[Path, Path]) -> None:
    base, adapter = road
    model = plain(base)
    lorafold.nn.load_adapter_into(model, adapter)
    with pytest.raises(LorafoldError):
        lorafold.merge_into(model, [adapter])


class Twice(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False)
        self.two = nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight


def test_updates_that_meet_in_one_weight_must_be_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    apart = nn.ModuleDict({"one": nn.Linear(8, 8, bias=False), "two": nn.Linear(8, 8, bias=False)})
    adapter = save_adapter(apart, tmp_path / "adapter", target_modules=["one", "two"])
    model = Twice()
    before = bits(model)
    with pytest.raises(UnsupportedAdapterError, match="share their memory, and would get different updates"):
        lorafold.merge_into(model, [adapter])
    assert same(bits(model), before)
    file = adapter / "adapter_model.safetensors"
    factors = load_file(file)
    save_file({name: factors[name.replace(".two.", ".one.")].clone() for name in factors}, file)
    merged = lorafold.merge_into(model, [adapter])
    update = lorafold.LowRankUpdate(*(load_file(file)[f"base_model.model.one.lora_{part}.weight"] for part in "AB"), 6 / 4)
    assert torch.equal(model.one.weight, lorafold.merge_weight(before["one.weight"], [update]))  # once, not twice
    merged.unmerge()
    assert same(bits(model), before)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_weight_of_no_outputs_takes_its_update(tmp_path: Path) -> None:
    """Classes of transformers have such weights where two of their sizes are equal (MobileBERT's head)."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 0), nn.Linear(8, 4))

    base, adapter = tmp_path / "base", save_adapter(made(), tmp_path / "adapter", target_modules=["0", "1"])
    base.mkdir()
    save_file(made().state_dict(), base / "model.safetensors", {"format": "pt"})
    lorafold.merge(base, [adapter], tmp_path / "out")
    model = made()
    merged = lorafold.merge_into(model, [adapter])
    found, wanted = model.state_dict(), tensors(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(found["1.weight"], made()[1].weight)
    merged.unmerge()
    assert all(torch.equal(tensor, made().state_dict()[name]) for name, tensor in model.state_dict().items())

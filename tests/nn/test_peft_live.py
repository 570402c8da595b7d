"""A model in memory of PEFT, of every kind that it trains, given to the live verbs: the bits of the files, PEFT's own answers.

The kinds are those of `peft_cases`: what PEFT puts on a module, perturbed as by training.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lycoris
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lorafold
import lorafold.nn
from lorafold.errors import (
    AdapterError,
    LayerError,
    LorafoldError,
    LorafoldWarning,
    NonFiniteError,
    PlanError,
    UnsupportedAdapterError,
)
from models import gpt2, llama, save_base, tensors
from peft_cases import CASES, MLP, Case, build, loaded, noisy, unmerged

Tensors = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),  # PEFT's, about what is tested here
]


def bits(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
        for name in one
    )


def live(case: Case, held: Tensors, adapter: Path, dtype: torch.dtype) -> Any:
    """The case's base in `dtype` with its adapter on it, as PEFT loads both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(loaded(case, held, dtype), adapter).eval()


@pytest.mark.parametrize("name", CASES)
def test_every_kind_gives_the_bits_of_the_files_and_comes_out_again(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base, held, adapter, _ = build(case, tmp_path)
    model = live(case, held, adapter, case.dtype)
    model.base_model.model.config = case.base_config  # what a base of the family says in its config.json
    before, modules = bits(model), [type(module) for module in model.modules()]
    if not case.decomposed:
        lorafold.merge(base, [adapter], tmp_path / "out")
        wanted = load_file(tmp_path / "out" / "model.safetensors")
        found = dict(lorafold.nn.iter_merged(model))
        assert set(found) == set(case.changed)
        assert same(found, {each: wanted[each] for each in found})
        assert same(lorafold.nn.merged_state_dict(model), wanted)
        assert same(bits(model), before)
        lorafold.merge(base, [model], tmp_path / "live")
        assert same(load_file(tmp_path / "live" / "model.safetensors"), wanted)

    merge = lorafold.merge_into(model)
    plain = model.get_base_model()
    if not case.decomposed:
        assert same({each: value for each, value in bits(plain).items() if each in wanted}, wanted)
    assert set(bits(plain)) == set(held)
    assert 0 < merge.nbytes <= sum(value.nbytes for value in held.values())
    merge.unmerge()
    assert [type(module) for module in model.modules()] == modules
    assert same(bits(model), before)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_answers_as_peft_does_before_and_after(tmp_path: Path, name: str) -> None:
    """In float64: sums of some tens of numbers below 10 in size, in another order. Where PEFT took something out of the base in
    float32, both models here have that same base."""
    case = CASES[name]
    _, held, adapter, _ = build(case, tmp_path)
    model: Any = unmerged(case, held, adapter)
    model.base_model.model.config = case.base_config
    with torch.no_grad():
        right = model(7)
        with lorafold.nn.merged(model) as within:
            answer = within(7)
            assert not any("lora" in each for each in bits(model))
        after = model(7)
    assert (answer - right).norm() / right.norm() < 1e-12
    assert torch.equal(after, right)


def mlp(*names: str, **config: Any) -> Any:
    """A model of PEFT in float64, with an adapter of each of `names` that does something; the first is active."""
    torch.manual_seed(3)
    settings = {"target_modules": ["lin0", "lin1"], "r": 4, "lora_alpha": 6, "init_lora_weights": False, **config}
    first, *others = names or ("default",)
    model = peft.get_peft_model(
        noisy(MLP().double()), peft.LoraConfig(**settings), adapter_name=first, autocast_adapter_dtype=False
    )
    for name in others:
        model.add_adapter(name, peft.LoraConfig(**{**settings, "r": 2}))
    return model.double().eval()


def close(one: Tensor, other: Tensor) -> bool:
    """In float64: sums of some tens of numbers below 10 in size, in another order."""
    return bool((one - other).norm() / other.norm() < 1e-12)


def test_several_adapters_are_summed_with_the_factors_that_their_layers_have_now() -> None:
    model = mlp("one", "two")
    model.base_model.set_adapter(["one", "two"])
    model.base_model.model.lin0.set_scale("two", 0.3)
    model.base_model.model.lin1.scale_layer(0.0)
    right, before = model(1), bits(model)
    with lorafold.nn.merged(model):
        assert close(model(1), right)
    assert same(bits(model), before)
    out = dict(lorafold.nn.iter_merged(model))
    layer = model.base_model.model.lin0
    delta = sum(layer.get_delta_weight(name) for name in ("one", "two"))
    assert close(out["lin0.weight"], layer.base_layer.weight + delta)
    assert torch.equal(out["lin1.weight"], model.base_model.model.lin1.base_layer.weight)  # its factors are 0


def test_a_weighted_adapter_of_peft_is_one_like_any_other() -> None:
    model = mlp("one", "two")
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], f"both_{kind}", combination_type=kind)
        model.set_adapter(f"both_{kind}")
        right = model(1)
        with lorafold.nn.merged(model):
            assert close(model(1), right), kind


def test_the_merge_is_merge_and_unload_in_float64_and_can_be_undone() -> None:
    model = mlp(use_dora=True, modules_to_save=["head"])
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    before, layers = bits(model), [type(module) for module in model.modules()]
    parameters = [id(parameter) for parameter in model.parameters()]
    merge = lorafold.merge_into(model)
    ours = model.get_base_model().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(close(ours[name], theirs[name]) for name in ours)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    with pytest.raises(LayerError, match="no layers of PEFT"):
        lorafold.merge_into(model)
    merge.unmerge()
    assert same(bits(model), before)
    assert [type(module) for module in model.modules()] == layers
    assert [id(parameter) for parameter in model.parameters()] == parameters  # so an optimizer goes on
    model.train()
    model(1).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_the_adapter_of_a_live_model_is_that_of_its_files(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    live = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    live.save_pretrained(tmp_path / "adapter")
    one, other = lorafold.load_adapter(live), lorafold.load_adapter(tmp_path / "adapter")
    assert one.format == other.format == "peft"
    assert one.modules.keys() == other.modules.keys()
    assert all(one.modules[name].scaling == other.modules[name].scaling for name in one.modules)
    lorafold.merge(base, [(live, 0.5)], tmp_path / "live")
    lorafold.merge(base, [(tmp_path / "adapter", 0.5)], tmp_path / "files")
    assert same(tensors(tmp_path / "live"), tensors(tmp_path / "files"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with lorafold.merge_into(plain, [(live, 0.5)]):
        assert same(bits(plain), tensors(tmp_path / "files"))
    with pytest.raises(PlanError, match="must be a list, not one model"):
        lorafold.merge_into(plain, live)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_has_the_names_of_its_checkpoint(tied: bool, tmp_path: Path) -> None:
    base = save_base(llama(tied=tied), tmp_path / "base", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)  # without a PeftModel, as transformers and diffusers do
    tokens = torch.arange(8)[None]
    right = model(tokens).logits
    found = lorafold.nn.merged_state_dict(model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.load_state_dict(found)
    assert torch.allclose(plain(tokens).logits, right, rtol=1e-4, atol=1e-4)  # float32 sums of some tens, as in test_live
    assert {n for n, _ in lorafold.nn.iter_merged(model)} == {
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_what_ties_apart_is_given_apart_and_said(tmp_path: Path) -> None:
    """The embedding is saved whole, and the head, tied to it in the base, keeps the base's numbers: as PEFT computes."""
    model = peft.get_peft_model(llama(tied=True), peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["embed_tokens"]))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.add_(1)
    with pytest.warns(LorafoldWarning, match=r"lm_head\.weight is not tied, and keeps its numbers"):
        found = dict(lorafold.nn.iter_merged(model))
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])
    with pytest.raises(UnsupportedAdapterError, match="share their memory, and only the first would change"):
        lorafold.merge_into(model)


def test_conv1d_and_a_step_of_training_between_two_exports() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        gpt2().float(), peft.LoraConfig(target_modules=["c_attn", "c_fc"], r=2, fan_in_fan_out=True, init_lora_weights=False)
    )
    tokens = torch.arange(8)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    last: Tensors = {}
    for _ in range(2):
        model.train()
        model(tokens).logits.square().mean().backward()
        optimizer.step()
        model.eval()
        found = dict(lorafold.nn.iter_merged(model))
        plain = gpt2().float()
        assert not plain.load_state_dict(found, strict=False).unexpected_keys
        assert torch.allclose(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
        assert all(not torch.equal(found[name], last.get(name, torch.zeros(1))) for name in found)
        last = found


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "merge": lorafold.nn.merge,
    "unmerge": lorafold.nn.unmerge,
    "set_active": lambda model: lorafold.nn.set_active(model, "default"),
    "swap": lambda model: lorafold.nn.swap(model, "default"),
    "detach": lorafold.nn.detach,
    "add_adapter": lambda model: lorafold.nn.add_adapter(model, "other", r=2),
    "remove_adapter": lambda model: lorafold.nn.remove_adapter(model, "other"),
    "save_adapter": lambda model: lorafold.nn.save_adapter(model, "nowhere"),
    "mark_only_lora_as_trainable": lorafold.nn.mark_only_lora_as_trainable,
    "lora_state_dict": lorafold.nn.lora_state_dict,
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_finds_no_layer_of_its_own_says_whose_it_saw(verb: str) -> None:
    model = mlp()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = bits(model)
    with pytest.raises(LayerError, match=rf"{verb}.* of PEFT: .*lin0 \(peft\.tuners\.lora\.layer\.Linear\)"):
        VERBS[verb](model)
    with pytest.raises(LayerError, match=f"{verb}.*no LoRA layer"):
        VERBS[verb](MLP())
    assert same(bits(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


@pytest.mark.parametrize(
    "verb", [lorafold.nn.iter_merged, lorafold.nn.merged_state_dict, lambda m: lorafold.nn.merged(m).__enter__()]
)
def test_exports_of_a_model_without_adapters_raise(verb: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(LayerError, match="no LoRA layer"):
        verb(MLP())


def test_nothing_is_put_among_the_layers_of_another() -> None:
    model = mlp()
    layers = [type(module) for module in model.modules()]
    with pytest.raises(LayerError, match="attach: the model has 2 layers of PEFT"):
        lorafold.nn.attach(model, "all-linear", r=2)
    with pytest.raises(LayerError, match="load_adapter_into: the model has 2 layers of PEFT"):
        lorafold.nn.load_adapter_into(model, "nowhere")
    assert [type(module) for module in model.modules()] == layers
    wrapped = lycoris.create_lycoris(plain := MLP(), 1.0, linear_dim=2, algo="lora")
    wrapped.apply_to()
    for verb in (lambda: lorafold.nn.attach(plain, "all-linear", r=2), lambda: lorafold.nn.merge(plain)):
        with pytest.raises(LayerError, match="LyCORIS"):
            verb()


class Foreign(nn.Module):
    """A layer of somebody's own, after loralib's naming, that is none of loralib's."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(2, 8))


def test_the_factors_of_another_are_not_frozen_in_silence() -> None:
    model = nn.Sequential(lorafold.nn.layers.Linear(8, 8, r=2), Foreign())
    with pytest.raises(LayerError, match=r"mark_only_lora_as_trainable: the model has 1 layer of a library of its own.*Foreign"):
        lorafold.nn.mark_only_lora_as_trainable(model)
    assert model[1].lora_A.requires_grad


def test_states_of_peft_that_mean_no_merge_are_refused() -> None:
    model = mlp("one", "two")
    before = bits(model)
    model.merge_adapter()
    with pytest.raises(LayerError, match="PEFT has merged one into the base weights itself"):
        lorafold.nn.merged_state_dict(model)
    model = mlp("one", "two")
    with model.disable_adapter(), pytest.raises(LayerError, match="switched off"):
        lorafold.merge_into(model)
    model.base_model.model.lin0.set_adapter("two")
    with pytest.raises(LayerError, match=r"lin1 uses the adapters \['one'\], and others \['two'\]"):
        lorafold.merge_into(model)
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(AdapterError, match="2 adapters of the model are active"):
        lorafold.load_adapter(model)
    with pytest.raises(LayerError, match="merged without naming any"):
        lorafold.merge_into(model, ["nowhere"])
    with pytest.raises(LayerError, match="no model of PEFT"):
        lorafold.load_adapter(MLP())
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.IA3Config, peft.OFTConfig, peft.VeraConfig])
def test_other_methods_of_peft_are_refused_by_name(kind: Any) -> None:
    settings: dict[str, Any] = {"target_modules": ["lin0"]} | ({"feedforward_modules": []} if kind is peft.IA3Config else {})
    if kind is peft.OFTConfig:
        settings["oft_block_size"] = 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(MLP(), kind(**settings))
    for verb in (lorafold.merge_into, lorafold.load_adapter, lorafold.nn.merged_state_dict):
        with pytest.raises(UnsupportedAdapterError, match=str(kind().peft_type.value)):
            verb(model)


def test_quantised_weights_under_the_layers_are_refused_by_name() -> None:
    model = mlp()
    inner = model.base_model.model.lin0.base_layer
    inner.weight = nn.Parameter((inner.weight.detach() * 8).to(torch.int8), requires_grad=False)
    before = bits(model)
    with pytest.raises(LorafoldError):
        lorafold.merge_into(model)
    assert same(bits(model), before)


def test_a_number_that_is_not_finite_is_found_before_anything_is_written() -> None:
    model = mlp()
    with torch.no_grad():
        model.base_model.model.lin1.lora_B["default"].weight[0, 0] = torch.nan
    before = bits(model)
    for verb in (lorafold.merge_into, lorafold.nn.iter_merged):
        with pytest.raises(NonFiniteError, match="lin1"):
            verb(model)
    assert same(bits(model), before)
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())

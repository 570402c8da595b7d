"""How a base stores a weight changes nothing: fused or apart, experts in a stack or one by one, names of older and newer models.

Each case is one model in two layouts and one adapter in two forms; all four merges must hold the same bits, and they are those of
the formula in numpy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import lorafold
from lorafold import LowRankUpdate
from lorafold.adapters import ReadOptions
from lorafold.errors import (
    AmbiguousNameError,
    InputError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    UnsupportedAdapterError,
)
from models import different, edit_json, edit_tensors, refused, tensors
from oracle import correctly_rounded

HIDDEN, INNER, RANK, EXPERTS = 8, 6, 2, 3
QKV = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
"""Rows of each: four heads of two, of which keys and values have two."""
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

Pair = tuple[Tensor, Tensor]


def save_base(path: Path, held: Mapping[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True)
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in held.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def save_pairs(path: Path, pairs: Mapping[str, Pair], **config: Any) -> Path:
    """A PEFT directory with scaling 2 for the pairs (lora_A, lora_B) of modules."""
    path.mkdir(parents=True)
    held = {}
    for module, (lora_A, lora_B) in pairs.items():
        held[f"base_model.model.{module}.lora_A.weight"] = lora_A.contiguous()
        held[f"base_model.model.{module}.lora_B.weight"] = lora_B.contiguous()
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "rank_pattern": {}, "alpha_pattern": {}}
    for module, (lora_A, _) in pairs.items():
        if lora_A.shape[0] != RANK:
            name = module.replace(".", r"\.")
            fields["rank_pattern"][name], fields["alpha_pattern"][name] = lora_A.shape[0], 2 * lora_A.shape[0]
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return path


def random(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def pair(out: int, inner: int, seed: int) -> Pair:
    return random(RANK, inner, seed=2 * seed), random(out, RANK, seed=2 * seed + 1)


def fused_pair(pairs: list[Pair]) -> Pair:
    """The pair of the weights of `pairs` one under the other: lora_A joined, lora_B block by block."""
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.block_diag(*(lora_B for _, lora_B in pairs))


def merged(base: Path, adapter: Path, **options: Any) -> dict[str, Tensor]:
    out = base.parent / f"{base.name} {adapter.name}"
    lorafold.merge(base, [adapter], out, **options)
    return tensors(out)


def wanted(weight: Tensor, *pairs: Pair) -> Tensor:
    updates = [LowRankUpdate(lora_A, lora_B, 2.0) for lora_A, lora_B in pairs]
    return torch.from_numpy(correctly_rounded(weight.bfloat16(), updates, torch.bfloat16)).bfloat16()


# projections of attention and of the perceptron


def projections(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Pair]]:
    """The weights of one layer apart, and a pair for each."""
    sizes = {f"self_attn.{name}": rows for name, rows in QKV.items()} | {"mlp.gate_proj": INNER, "mlp.up_proj": INNER}
    weights = {name: random(rows, HIDDEN, seed=seed + 100 + i) for i, (name, rows) in enumerate(sizes.items())}
    return weights, {name: pair(rows, HIDDEN, seed + i) for i, (name, rows) in enumerate(sizes.items())}


def in_layer(held: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
    return {f"model.layers.0.{name}{ending}": value for name, value in held.items()}


FUSED = {"self_attn.qkv_proj": [f"self_attn.{name}" for name in QKV], "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_projections_fused_or_apart_merge_to_the_same_bits(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("fused")
    weights, pairs = projections(seed)
    together = {whole: torch.cat([weights[part] for part in parts]) for whole, parts in FUSED.items()}
    apart = save_base(path / "apart", in_layer(weights, ".weight"), model_type="llama", **HEADS)
    fused = save_base(path / "fused", in_layer(together, ".weight"), model_type="phi3", **HEADS)
    single = save_pairs(path / "single", in_layer(pairs))
    joined = {whole: fused_pair([pairs[part] for part in parts]) for whole, parts in FUSED.items()}
    both = save_pairs(path / "both", in_layer(joined))
    expected = {name: wanted(weights[name], pairs[name]) for name in weights}
    expected_together = {whole: torch.cat([expected[part] for part in parts]) for whole, parts in FUSED.items()}
    for adapter in (single, both):
        assert different(merged(apart, adapter), in_layer(expected, ".weight")) == {}
        assert different(merged(fused, adapter), in_layer(expected_together, ".weight")) == {}


def fused_base(path: Path, **config: Any) -> Path:
    weights, _ = projections()
    together = {whole: torch.cat([weights[part] for part in parts]) for whole, parts in FUSED.items()}
    return save_base(path / "base", in_layer(together, ".weight"), **config)


def test_one_part_alone_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)}))
    before, after = tensors(base), merged(base, adapter)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    changed = (before[name] != after[name]).any(dim=1)
    assert changed.tolist() == [8 <= row < 12 for row in range(16)]
    assert different({n: t for n, t in after.items() if n != name}, {n: t for n, t in before.items() if n != name}) == {}
    notes = lorafold.plan(base, [adapter]).notes
    assert "model.layers.0.self_attn.k_proj: a part of a fused weight" in notes


@pytest.mark.parametrize(
    "config", [{"model_type": "unheard_of", **HEADS}, {"model_type": "phi3"}, {}], ids=["family", "heads", "all"]
)
def test_parts_whose_rows_are_not_known_are_not_guessed(tmp_path: Path, config: dict[str, Any]) -> None:
    base = fused_base(tmp_path, **config)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)}))
    error = refused(base, [adapter], UnmatchedAdapterError, "k_proj")
    assert "the base has model.layers.0.self_attn.qkv_proj.weight, but which of its rows" in str(error)


def test_a_part_of_another_size_does_not_fit(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(6, HIDDEN, 1)}))
    refused(base, [adapter], ShapeMismatchError, "of whose outputs those from 1/2 to 3/4 of all")


def test_a_fused_update_that_is_longer_than_its_parts_does_not_fit(tmp_path: Path) -> None:
    weights, _ = projections()
    base = save_base(tmp_path / "base", in_layer(weights, ".weight"), model_type="llama")
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.qkv_proj": pair(18, HIDDEN, 1)}))
    refused(base, [adapter], ShapeMismatchError, "ΔW is [18, 8]", "q_proj", "k_proj", "v_proj")


def test_dora_on_a_part_is_refused(tmp_path: Path) -> None:
    """Its length is that of the fused weight's rows, which would have to be rescaled in part."""
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)}), use_dora=True)
    magnitude = {"base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector": torch.ones(4)}
    edit_tensors(adapter, lambda held: held | magnitude)
    refused(base, [adapter], UnsupportedAdapterError, "DoRA", "k_proj")


def test_a_residual_of_a_part_is_refused(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    pairs = in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)})
    adapter = save_pairs(tmp_path / "adapter", pairs, init_lora_weights="olora")
    refused(base, [adapter], UnsupportedAdapterError, "olora", "k_proj")


def test_a_bias_for_a_part_is_refused(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    edit_tensors(base, lambda held: held | {"model.layers.0.self_attn.qkv_proj.bias": torch.ones(16).bfloat16()})
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)}), lora_bias=True)
    bias = {"base_model.model.model.layers.0.self_attn.k_proj.lora_B.bias": torch.ones(4)}
    edit_tensors(adapter, lambda held: held | bias)
    refused(base, [adapter], UnsupportedAdapterError, "lora_bias", "stores with others")


def test_part_and_whole_of_one_weight_are_changed_twice(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    pairs = {"self_attn.k_proj": pair(4, HIDDEN, 1), "self_attn.qkv_proj": pair(16, HIDDEN, 2)}
    adapter = save_pairs(tmp_path / "adapter", in_layer(pairs))
    with pytest.raises(InputError, match="is changed twice"):
        lorafold.plan(base, [adapter])


def test_a_whole_tensor_for_a_part_is_refused(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"mlp.gate_up_proj": pair(12, HIDDEN, 1)}), modules_to_save=["k_proj"])
    edit_tensors(adapter, lambda held: held | {"base_model.model.model.layers.0.self_attn.k_proj.weight": torch.ones(4, HIDDEN)})
    refused(base, [adapter], UnsupportedAdapterError, "stores with others: model.layers.0.self_attn.qkv_proj.weight")


def test_the_input_projections_of_attention(tmp_path: Path) -> None:
    """PEFT names the attention itself, whose weight is called in_proj_weight."""
    weight, update, output = random(24, HIDDEN, seed=1), pair(24, HIDDEN, 3), pair(HIDDEN, HIDDEN, 4)
    held = {"encoder.attn.in_proj_weight": weight, "encoder.attn.in_proj_bias": random(24, seed=2)}
    base = save_base(tmp_path / "base", held | {"encoder.attn.out_proj.weight": random(HIDDEN, HIDDEN, seed=5)})
    adapter = save_pairs(tmp_path / "adapter", {"encoder.attn": update, "encoder.attn.base_layer.out_proj": output})
    after = merged(base, adapter)
    assert torch.equal(after["encoder.attn.in_proj_weight"], wanted(weight, update))
    assert torch.equal(after["encoder.attn.in_proj_bias"], held["encoder.attn.in_proj_bias"].bfloat16())


# experts


def experts(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Pair]]:
    """Weights and pairs of gate, up and down projections of each expert."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    names = [f"{expert}.{leaf}" for expert in range(EXPERTS) for leaf in shapes]
    weights = {name: random(*shapes[name[2:]], seed=seed + 200 + i) for i, name in enumerate(names)}
    return weights, {name: pair(*shapes[name[2:]], seed + i) for i, name in enumerate(names)}


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(E, 2 · inner, hidden) with the gate before the up projection, and (E, hidden, inner)."""
    gate_up = [torch.cat([weights[f"{e}.gate_proj"], weights[f"{e}.up_proj"]]) for e in range(EXPERTS)]
    return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack([weights[f"{e}.down_proj"] for e in range(EXPERTS)])}


def mixtral(held: Mapping[str, Any]) -> dict[str, Any]:
    """What Mixtral calls the projections, in files of transformers 4 and 5 alike."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {
        f"model.layers.0.block_sparse_moe.experts.{name[0]}.{names[name[2:]]}": value for name, value in held.items() if name[2:]
    }


def module(held: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.layers.0.mlp.experts.{name}": value for name, value in held.items()}


def weight(held: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.weight": value for name, value in held.items()}


@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_experts_in_a_stack_or_one_by_one_merge_to_the_same_bits(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("experts")
    weights, pairs = experts(seed)
    apart = save_base(path / "apart", weight(mixtral(weights)), model_type="mixtral")
    renamed = save_base(path / "renamed", weight(module(weights)), model_type="mixtral")
    stack = save_base(path / "stack", module(stacked(weights)), model_type="mixtral")
    older, newer = save_pairs(path / "older", mixtral(pairs)), save_pairs(path / "newer", module(pairs))
    expected = {name: wanted(weights[name], pairs[name]) for name in weights}
    for adapter in (older, newer):
        assert different(merged(apart, adapter), weight(mixtral(expected))) == {}
        assert different(merged(renamed, adapter), weight(module(expected))) == {}
        assert different(merged(stack, adapter), module(stacked(expected))) == {}


def parameter_pairs(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same updates as PEFT stores them for bare parameters: lora_A (E · r, in), lora_B (out, r · E), the expert fastest."""
    gate_up = [fused_pair([pairs[f"{e}.gate_proj"], pairs[f"{e}.up_proj"]]) for e in range(EXPERTS)]
    down = [pairs[f"{e}.down_proj"] for e in range(EXPERTS)]
    return {f"experts{inner}": packed(each) for inner, each in ((".base_layer", gate_up), ("", down))}


def packed(pairs: list[Pair]) -> Pair:
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.stack([lora_B for _, lora_B in pairs], dim=2).flatten(1)


def save_parameters(path: Path, pairs: Mapping[str, Pair], ranks: Mapping[str, int], **config: Any) -> Path:
    """A PEFT directory for bare parameters, of rank `ranks` each; the first that is registered is the innermost."""
    saved = save_pairs(path, {f"model.layers.0.mlp.{name}": each for name, each in pairs.items()})
    fields = {
        "target_parameters": [f"experts.{name}" for name in ranks],
        "rank_pattern": {rf".*\.{name}": r for name, r in ranks.items()},
        "alpha_pattern": {rf".*\.{name}": 2 * r for name, r in ranks.items()},
        "peft_version": "0.21.2",
    }
    edit_json(saved / "adapter_config.json", **fields | config)
    return saved


RANKS = {"gate_up_proj": 2 * RANK, "down_proj": RANK}


def test_an_adapter_for_stacks_merges_into_experts_one_by_one(tmp_path: Path) -> None:
    weights, pairs = experts()
    apart = save_base(tmp_path / "apart", weight(mixtral(weights)), model_type="mixtral")
    stack = save_base(tmp_path / "stack", module(stacked(weights)), model_type="mixtral")
    adapter = save_parameters(tmp_path / "adapter", parameter_pairs(pairs), RANKS)
    expected = {name: wanted(weights[name], pairs[name]) for name in weights}
    assert different(merged(apart, adapter), weight(mixtral(expected))) == {}
    assert different(merged(stack, adapter), module(stacked(expected))) == {}


def test_experts_stored_the_other_way_round(tmp_path: Path) -> None:
    """gpt-oss stores (E, in, out); its gate and up rows alternate, which is the adapter's own business as long as it is fused."""
    weights, pairs = experts()
    turned = {name: each.transpose(1, 2) for name, each in stacked(weights).items()}
    base = save_base(tmp_path / "base", module(turned), model_type="gpt_oss")
    adapter = save_parameters(tmp_path / "adapter", parameter_pairs(pairs), RANKS)
    expected = stacked({name: wanted(weights[name], pairs[name]) for name in weights})
    assert different(merged(base, adapter), module({name: each.transpose(1, 2) for name, each in expected.items()})) == {}


def test_one_expert_of_alternating_rows_is_not_guessed(tmp_path: Path) -> None:
    weights, pairs = experts()
    base = save_base(tmp_path / "base", module(stacked(weights)), model_type="gpt_oss")
    adapter = save_pairs(tmp_path / "adapter", module({name: each for name, each in pairs.items() if "gate" in name}))
    refused(base, [adapter], UnmatchedAdapterError, "which of its rows are for which projection is not known")


def test_the_gate_of_experts_stored_the_other_way_round_is_refused(tmp_path: Path) -> None:
    weights, pairs = experts()
    turned = {name: each.transpose(1, 2) for name, each in stacked(weights).items()}
    base = save_base(tmp_path / "base", module(turned), model_type="llama4_text")
    adapter = save_pairs(tmp_path / "adapter", module({name: each for name, each in pairs.items() if "gate" in name}))
    refused(base, [adapter], UnsupportedAdapterError, "some of the columns of model.layers.0.mlp.experts.gate_up_proj")


def test_an_expert_that_the_base_does_not_have(tmp_path: Path) -> None:
    weights, pairs = experts()
    base = save_base(tmp_path / "base", module(stacked(weights)), model_type="mixtral")
    adapter = save_pairs(tmp_path / "adapter", module({"7.down_proj": pair(HIDDEN, INNER, 70), **pairs}))
    refused(base, [adapter], UnmatchedAdapterError, "1 of 10", "experts.7.down_proj")


@pytest.mark.parametrize("layout", ["apart", "stack"])
def test_experts_that_are_left_out_are_told(tmp_path: Path, layout: str) -> None:
    weights, pairs = experts()
    held = weight(module(weights)) if layout == "apart" else module(stacked(weights))
    base = save_base(tmp_path / "base", held, model_type="qwen3_moe")
    adapter = save_pairs(tmp_path / "adapter", module({name: each for name, each in pairs.items() if name != "1.gate_proj"}))
    notes = lorafold.plan(base, [adapter]).notes
    assert "the adapter holds nothing for expert 1 of model.layers.0.mlp.experts.gate_proj" in notes


def test_an_adapter_for_another_number_of_experts(tmp_path: Path) -> None:
    weights, pairs = experts()
    fewer = save_parameters(tmp_path / "fewer", {"experts": packed([pairs[f"{e}.down_proj"] for e in (0, 1)])}, {"down_proj": RANK})
    base = save_base(tmp_path / "base", weight(module(weights)), model_type="qwen3_moe")
    with pytest.raises(InputError, match="4 rows, which is no multiple of 3 experts"):
        lorafold.plan(base, [fewer])


def test_experts_packed_one_after_the_other(tmp_path: Path) -> None:
    """As Unsloth trained them until September 2026: nothing in the file tells, so the user must."""
    weights, pairs = experts()
    down = [pairs[f"{e}.down_proj"] for e in range(EXPERTS)]
    major = (torch.cat([lora_A for lora_A, _ in down]), torch.cat([lora_B for _, lora_B in down], dim=1))
    base = save_base(tmp_path / "base", weight(module(weights)), model_type="qwen3_moe")
    adapter = save_parameters(tmp_path / "adapter", {"experts": major}, {"down_proj": RANK})
    after = merged(base, adapter, read_options=ReadOptions(expert_layout="expert-major"))
    for e in range(EXPERTS):
        name = f"{e}.down_proj"
        assert torch.equal(after[f"model.layers.0.mlp.experts.{name}.weight"], wanted(weights[name], pairs[name]))
    assert any("--expert-layout" in note for note in lorafold.plan(base, [adapter]).notes)


@pytest.mark.parametrize(
    ("version", "model", "turned"),
    [
        ("0.21.2", "qwen3_moe", False),
        ("0.21.2", "gpt_oss", True),
        ("0.19.0", "qwen3_moe", True),
        ("0.19.0", "gpt_oss", False),
        ("0.18.1", "qwen3_moe", True),
        ("0.18.1", "gpt_oss", True),
    ],
)
def test_square_experts_follow_the_version_of_peft(tmp_path: Path, version: str, model: str, turned: bool) -> None:
    """Which of the two dimensions PEFT took for the inputs: up to 0.18 the first, then by what the module says of itself."""
    stack = random(EXPERTS, HIDDEN, HIDDEN, seed=1)
    pairs = [pair(HIDDEN, HIDDEN, e) for e in range(EXPERTS)]
    base = save_base(tmp_path / "base", module({"down_proj": stack}), model_type=model)
    adapter = save_parameters(tmp_path / "adapter", {"experts": packed(pairs)}, {"down_proj": RANK}, peft_version=version)
    after = merged(base, adapter)["model.layers.0.mlp.experts.down_proj"]
    for e, (lora_A, lora_B) in enumerate(pairs):
        flipped = (lora_B.T, lora_A.T) if turned else (lora_A, lora_B)
        assert torch.equal(after[e], wanted(stack[e], flipped))


@pytest.mark.parametrize("lacking", ["peft_version", "model_type"])
def test_square_experts_that_nothing_tells_of_are_not_guessed(tmp_path: Path, lacking: str) -> None:
    base = save_base(tmp_path / "base", module({"down_proj": random(EXPERTS, HIDDEN, HIDDEN, seed=1)}), model_type="qwen3_moe")
    pairs = {"experts": packed([pair(HIDDEN, HIDDEN, e) for e in range(EXPERTS)])}
    adapter = save_parameters(tmp_path / "adapter", pairs, {"down_proj": RANK})
    edit_json((adapter / "adapter_config.json") if lacking == "peft_version" else (base / "config.json"), **{lacking: None})
    refused(base, [adapter], AmbiguousNameError, "are square", lacking)

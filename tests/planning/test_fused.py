"""How a base stores projections changes nothing: fused or apart, each merge holds the bits of the formula in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold
from lorafold.errors import InputError, ShapeMismatchError, UnmatchedAdapterError, UnsupportedAdapterError
from models import different, edit_tensors, refused, tensors
from planning.layouts import (
    FUSED,
    HEADS,
    HIDDEN,
    fused_pair,
    in_layer,
    merged,
    pair,
    projections,
    random,
    save_base,
    save_pairs,
    wanted,
)


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
    assert "the base has model.layers.0.self_attn.qkv_proj.weight, but how query, key and value" in str(error)


def test_a_fused_adapter_of_an_unknown_family_is_not_cut_up(tmp_path: Path) -> None:
    weights, pairs = projections()
    base = save_base(tmp_path / "base", in_layer(weights, ".weight"), model_type="unheard_of", **HEADS)
    both = {"mlp.gate_up_proj": fused_pair([pairs["mlp.gate_proj"], pairs["mlp.up_proj"]])}
    error = refused(base, [save_pairs(tmp_path / "adapter", in_layer(both))], UnmatchedAdapterError, "mlp.gate_up_proj")
    assert "the base has model.layers.0.mlp.gate_proj.weight, but how" in str(error)


def test_a_part_of_another_size_does_not_fit(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(6, HIDDEN, 1)}))
    refused(base, [adapter], ShapeMismatchError, "of whose outputs those from 1/2 to 3/4 of all")


def test_a_fused_update_that_is_longer_than_its_parts_does_not_fit(tmp_path: Path) -> None:
    weights, _ = projections()
    base = save_base(tmp_path / "base", in_layer(weights, ".weight"), model_type="llama")
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.qkv_proj": pair(18, HIDDEN, 1)}))
    refused(base, [adapter], ShapeMismatchError, "ΔW is [18, 8]", "q_proj", "k_proj", "v_proj")


def test_dora_on_a_part_is_that_of_the_part_alone(tmp_path: Path) -> None:
    """A scale is of one output: the norms of the part's rows are the same wherever they lie."""
    weights, _ = projections()
    apart = save_base(tmp_path / "apart", in_layer(weights, ".weight"), model_type="llama", **HEADS)
    fused = fused_base(tmp_path, model_type="phi3", **HEADS)
    pairs = {"self_attn.q_proj": pair(8, HIDDEN, 1), "self_attn.k_proj": pair(4, HIDDEN, 2)}
    adapter = save_pairs(tmp_path / "adapter", in_layer(pairs), use_dora=True)
    scales = {
        f"base_model.model.model.layers.0.{name}.lora_magnitude_vector": torch.rand(B.shape[0]) + 0.5
        for name, (_, B) in pairs.items()
    }
    edit_tensors(adapter, lambda held: held | scales)
    expected = merged(apart, adapter)
    parts = [expected[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(merged(fused, adapter)["model.layers.0.self_attn.qkv_proj.weight"], torch.cat(parts))
    assert not torch.equal(parts[1], weights["self_attn.k_proj"])


def test_a_residual_of_a_part_is_refused(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    pairs = in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)})
    adapter = save_pairs(tmp_path / "adapter", pairs, init_lora_weights="olora")
    refused(base, [adapter], UnsupportedAdapterError, "olora", "k_proj")


def test_a_bias_for_a_part_is_added_to_its_rows(tmp_path: Path) -> None:
    base = fused_base(tmp_path, model_type="phi3", **HEADS)
    before = random(16, seed=8)
    edit_tensors(base, lambda held: held | {"model.layers.0.self_attn.qkv_proj.bias": before})
    adapter = save_pairs(tmp_path / "adapter", in_layer({"self_attn.k_proj": pair(4, HIDDEN, 1)}), lora_bias=True)
    bias = torch.randn(4, generator=torch.Generator().manual_seed(9))
    edit_tensors(adapter, lambda held: held | {"base_model.model.model.layers.0.self_attn.k_proj.lora_B.bias": bias})
    (addend,) = (a for step in lorafold.plan(base, [adapter]).steps if step.tensor.endswith("qkv_proj.bias") for a in step.addends)
    wanted_bias = before.clone()
    wanted_bias[8:12] = (before[8:12].double() + addend.scaling * bias.double()).to(before.dtype)
    assert torch.equal(merged(base, adapter)["model.layers.0.self_attn.qkv_proj.bias"], wanted_bias)


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

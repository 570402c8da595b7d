"""How a base stores experts changes nothing: one by one, in a stack, either way round, under older names or newer ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AmbiguousNameError, InputError, UnmatchedAdapterError, UnsupportedAdapterError
from models import different, edit_json, refused
from planning.layouts import (
    EXPERTS,
    HIDDEN,
    INNER,
    RANK,
    RANKS,
    experts,
    merged,
    mixtral,
    module,
    packed,
    pair,
    parameter_pairs,
    random,
    save_base,
    save_pairs,
    save_parameters,
    stacked,
    wanted,
    weight,
)


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
    refused(base, [adapter], UnmatchedAdapterError, "gate and up lie in a fused weight is not known")


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
    assert any("expert_layout=" in note for note in lorafold.plan(base, [adapter]).notes)


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


@pytest.mark.parametrize("turned", [True, False])
def test_square_experts_are_seen_as_the_others_of_their_module(tmp_path: Path, turned: bool) -> None:
    """gpt-oss is so: its down projections are square, its fused ones are not, and the module marks itself since transformers 5."""
    shapes = {"gate_up_proj": (HIDDEN, 2 * HIDDEN), "down_proj": (HIDDEN, HIDDEN)}  # (in, out), as they are stored
    stacks = {name: random(EXPERTS, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    seen = {name: shape[::-1] if turned else shape for name, shape in shapes.items()}  # (out, in), as PEFT takes them
    pairs = {name: [pair(*seen[name], 10 * i + e) for e in range(EXPERTS)] for i, name in enumerate(shapes)}
    base = save_base(tmp_path / "base", module(stacks), model_type="gpt_oss")
    held = {"experts.base_layer": packed(pairs["gate_up_proj"]), "experts": packed(pairs["down_proj"])}
    adapter = save_parameters(tmp_path / "adapter", held, dict.fromkeys(shapes, RANK))
    after = merged(base, adapter)
    for name, each in pairs.items():
        for e, (lora_A, lora_B) in enumerate(each):
            flipped = (lora_B.T, lora_A.T) if turned else (lora_A, lora_B)
            assert torch.equal(after[f"model.layers.0.mlp.experts.{name}"][e], wanted(stacks[name][e], flipped))


@pytest.mark.parametrize(("version", "turned"), [("0.21.2", False), ("0.18.1", True)])
def test_square_experts_one_by_one_follow_it_too(tmp_path: Path, version: str, turned: bool) -> None:
    weights = {f"{e}.down_proj": random(HIDDEN, HIDDEN, seed=e) for e in range(EXPERTS)}
    pairs = [pair(HIDDEN, HIDDEN, e) for e in range(EXPERTS)]
    base = save_base(tmp_path / "base", weight(module(weights)), model_type="qwen3_moe")
    adapter = save_parameters(tmp_path / "adapter", {"experts": packed(pairs)}, {"down_proj": RANK}, peft_version=version)
    after = merged(base, adapter)
    for e, (lora_A, lora_B) in enumerate(pairs):
        flipped = (lora_B.T, lora_A.T) if turned else (lora_A, lora_B)
        assert torch.equal(after[f"model.layers.0.mlp.experts.{e}.down_proj.weight"], wanted(weights[f"{e}.down_proj"], flipped))


@pytest.mark.parametrize("version", ["0.21.2", "0.18.1"])
def test_a_square_stack_of_two_projections_in_parts(tmp_path: Path, version: str) -> None:
    """What was trained transposed is the transpose of B @ A, whose rows are those of gate and up."""
    half = HIDDEN // 2
    weights = {f"{e}.{name}": random(half, HIDDEN, seed=e) for e in range(EXPERTS) for name in ("gate_proj", "up_proj")}
    pairs = [pair(HIDDEN, HIDDEN, e) for e in range(EXPERTS)]
    base = save_base(tmp_path / "base", weight(module(weights)), model_type="qwen3_moe")
    adapter = save_parameters(tmp_path / "adapter", {"experts": packed(pairs)}, {"gate_up_proj": RANK}, peft_version=version)
    after = merged(base, adapter)
    for e, (lora_A, lora_B) in enumerate(pairs):
        if version == "0.18.1":
            lora_A, lora_B = lora_B.T, lora_A.T
        parts = {"gate_proj": lora_B[:half], "up_proj": lora_B[half:]}
        for name, rows in parts.items():
            found = after[f"model.layers.0.mlp.experts.{e}.{name}.weight"]
            assert torch.equal(found, wanted(weights[f"{e}.{name}"], (lora_A, rows)))


@pytest.mark.parametrize("lacking", ["peft_version", "model_type"])
def test_square_experts_that_nothing_tells_of_are_not_guessed(tmp_path: Path, lacking: str) -> None:
    base = save_base(tmp_path / "base", module({"down_proj": random(EXPERTS, HIDDEN, HIDDEN, seed=1)}), model_type="qwen3_moe")
    pairs = {"experts": packed([pair(HIDDEN, HIDDEN, e) for e in range(EXPERTS)])}
    adapter = save_parameters(tmp_path / "adapter", pairs, {"down_proj": RANK})
    edit_json((adapter / "adapter_config.json") if lacking == "peft_version" else (base / "config.json"), **{lacking: None})
    refused(base, [adapter], AmbiguousNameError, "are square", lacking)

"""What a base offers: every tensor under its own name, and under each other name exactly the numbers that are meant by it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.files.safetensors.info import TensorInfo
from lorafold.planning.families import FAMILIES
from lorafold.planning.names.offers import WHOLE, Slot, offers_of, shape_of
from lorafold.planning.names.renames import respelled

NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "mlp", "experts", "w1", "gate_proj", "up_proj", "qkv_proj", "weight"])
)


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, "BF16", shape, 0, 0, Path("base")) for name, shape in shapes.items()}


@given(st.lists(NAMES.map(".".join), min_size=1, unique=True), st.sampled_from([None, *FAMILIES]))
def test_every_tensor_is_offered_whole_under_its_own_name(names: list[str], family: str | None) -> None:
    tensors = infos(**dict.fromkeys(names, (6, 4)))
    offers = offers_of(tensors, {"model_type": family})
    assert all(offers.find(offers.spell(name)) == (Slot(name),) for name in names)


@given(queries=st.integers(1, 8), groups=st.integers(1, 8), size=st.integers(1, 8))
def test_the_parts_of_a_fused_weight_are_all_of_it_and_do_not_overlap(queries: int, groups: int, size: int) -> None:
    heads, rows = queries * groups, (queries * groups + 2 * groups) * size
    config = {"model_type": "phi3", "num_attention_heads": heads, "num_key_value_heads": groups}
    tensors = infos(**{"attn.qkv_proj.weight": (rows, 4)})
    offers = offers_of(tensors, config)
    parts = [offers.find(f"attn.{name}_proj.weight") for name in "qkv"]
    assert [shape_of(each, tensors)[0] for each in parts] == [heads * size, groups * size, groups * size]
    ends = [end for (slot,) in parts for end in slot.outputs]
    assert (ends[0], ends[-1]) == WHOLE
    assert ends[1:-1:2] == ends[2::2]


def test_a_family_that_is_not_known_offers_no_parts() -> None:
    tensors = infos(**{"mlp.experts.gate_up_proj": (2, 6, 4), "mlp.experts.down_proj": (2, 4, 3)})
    for config in ({"model_type": "unheard_of"}, {"model_type": "gpt_oss"}, {}, None):
        offers = offers_of(tensors, config)
        assert not offers.find("mlp.experts.1.gate_proj.weight")
        assert offers.withheld["mlp.experts.1.gate_proj.weight"] == "mlp.experts.gate_up_proj"
        assert offers.find("mlp.experts.1.down_proj.weight") == (Slot("mlp.experts.down_proj", 1),)  # has no parts
        assert offers.find("mlp.experts.gate_up_proj", 1) == (Slot("mlp.experts.gate_up_proj", 1),)
    upper = offers_of(tensors, {"model_type": "qwen3_moe"}).find("mlp.experts.1.up_proj.weight")
    assert upper == (Slot("mlp.experts.gate_up_proj", 1, (Fraction(1, 2), Fraction(1))),)


def test_the_input_projections_of_attention_are_one_weight_and_three() -> None:
    tensors = infos(**{"attn.in_proj_weight": (12, 4), "attn.in_proj_bias": (12,)})
    offers = offers_of(tensors, None)
    assert offers.find("attn.weight") == (Slot("attn.in_proj_weight"),)
    assert offers.find("attn.bias") == (Slot("attn.in_proj_bias"),)
    assert offers.find("attn.k_proj.weight") == (Slot("attn.in_proj_weight", None, (Fraction(1, 3), Fraction(2, 3))),)


def test_an_expert_that_lacks_a_projection_is_not_offered_joined() -> None:
    stored = [f"mlp.experts.{e}.{name}.weight" for e in (0, 1) for name in ("gate_proj", "up_proj")]
    offers = offers_of(infos(**dict.fromkeys(stored[:3], (3, 4))), {"model_type": "qwen3_moe"})
    assert len(offers.find("mlp.experts.gate_up_proj", 0)) == 2
    assert not offers.find("mlp.experts.gate_up_proj", 1)
    unknown = offers_of(infos(**dict.fromkeys(stored, (3, 4))), None)
    assert not unknown.find("mlp.experts.gate_up_proj", 0)
    assert unknown.withheld["mlp.experts.gate_up_proj"] == stored[0]


def test_two_spellings_in_one_checkpoint_are_two_weights() -> None:
    tensors = infos(**{"block_sparse_moe.gate.weight": (2, 4), "mlp.gate.weight": (2, 4)})
    offers = offers_of(tensors, {"model_type": "mixtral"})
    assert all(offers.find(offers.spell(name)) == (Slot(name),) for name in tensors)


@pytest.mark.parametrize("family", sorted(name for name, family in FAMILIES.items() if family.spellings))
def test_newer_names_stay_as_they_are(family: str) -> None:
    rules = FAMILIES[family].spellings
    for old, new in rules:
        name = f"{'' if old.startswith('^') else 'part.'}{new.replace('*', '0')}.weight".removeprefix(".")
        assert respelled(name, rules) == name

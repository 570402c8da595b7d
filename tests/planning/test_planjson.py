"""A plan survives JSON; what is no plan is refused; equal inputs give equal plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold
from lorafold.adapters.adapter import WeightedAdapter
from lorafold.engine.sources import Sources
from lorafold.errors import PlanError
from lorafold.options import SumOptions
from lorafold.planning.make import make_plan
from lorafold.planning.plan import Addend, MergePlan, PlannedAdapter, PlannedShard, Step, plan_from_json, plan_to_json
from models import edit_json, plain_adapter, plain_base

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_NUMBER = st.floats(allow_nan=False, allow_infinity=False)
_ADDEND = st.builds(Addend, st.integers(0, 3), _TEXT, st.sampled_from(["weight", "bias"]), st.booleans(), _NUMBER, _TEXT)
_STEP = st.builds(
    Step, _TEXT, st.sampled_from(["copy", "cast", "merge", "replace"]), _TEXT, st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.none() | _TEXT, st.lists(_ADDEND, max_size=2).map(tuple), st.none() | st.integers(0, 3), st.none() | _TEXT,
)  # fmt: skip
_PLAN = st.builds(
    MergePlan, _TEXT, _TEXT,
    st.lists(st.builds(PlannedAdapter, _TEXT, _TEXT, _TEXT, _NUMBER, _TEXT, st.none() | _TEXT), max_size=2).map(tuple),
    st.builds(
        SumOptions, st.sampled_from(["exact", "fast"]), st.sampled_from(["nearest", "stochastic"]), st.integers(),
        st.none() | st.sampled_from(["BF16", "F16", "F32", "F64"]), st.none() | st.integers(1),
    ),
    st.lists(st.builds(PlannedShard, _TEXT, st.lists(_STEP, max_size=2).map(tuple)), max_size=2).map(tuple),
    st.dictionaries(_TEXT, st.none() | st.booleans() | st.integers() | _TEXT, max_size=2),
    st.lists(_TEXT, max_size=2).map(tuple),
)  # fmt: skip


@given(_PLAN)
@settings(max_examples=60, deadline=None)
def test_round_trip(plan: MergePlan) -> None:
    assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


@pytest.mark.parametrize("value", [None, [], "x", {}, {"format": 2}, {"format": 1}, {"format": 1, "shards": 3}])
def test_what_is_no_plan(value: Any) -> None:
    with pytest.raises(PlanError):
        plan_from_json(value)


@pytest.mark.parametrize("change", [{"surprise": 1}, {"adapters": [{"name": "x"}]}, {"options": {"speed": 9}}, {"shards": [3]}])
def test_a_plan_with_other_fields(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = lorafold.plan(plain_base(tmp_path / "base"), [plain_adapter(tmp_path / "adapter")])
    with pytest.raises(PlanError, match="the plan cannot be read"):
        plan_from_json(json.loads(json.dumps(plan_to_json(plan))) | change)


def test_equal_inputs_give_equal_plans_and_other_files_are_noticed(tmp_path: Path) -> None:
    base, path = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    plan = lorafold.plan(base, [path])
    assert lorafold.plan(base, [path]) == plan
    checkpoint, adapter = lorafold.open_checkpoint(base), lorafold.load_adapter(path)
    edit_json(path / "adapter_config.json", lora_alpha=5)
    with (
        pytest.raises(PlanError, match="the plan was made for another adapter"),
        Sources(plan, checkpoint, [lorafold.load_adapter(path)]),
    ):
        pass
    other = lorafold.open_checkpoint(plain_base(tmp_path / "other", modules=("q_proj",)))
    with pytest.raises(PlanError, match="the plan was made for another base"), Sources(plan, other, [adapter]):
        pass
    assert make_plan(checkpoint, [WeightedAdapter(adapter, 2)]).adapters[0].adapter_weight == 2

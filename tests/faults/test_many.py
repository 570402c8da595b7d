"""Very many names and very long configurations: an error lists some and counts the rest, and nothing compares all with all."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from lorafold.errors import SHOWN, AdapterError, UnmatchedAdapterError, nearest_names
from lorafold.files.strictjson import CONFIG_LIMIT
from models import edit_json, edit_tensors

MANY = 5000


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many names were compared letter by letter, each time."""
    counts: list[int] = []
    real = difflib.get_close_matches

    def counting(word: str, possibilities: Any, n: int = 3, cutoff: float = 0.6) -> list[str]:
        possibilities = list(possibilities)
        counts.append(len(possibilities))
        return real(word, possibilities, n, cutoff)

    monkeypatch.setattr(difflib, "get_close_matches", counting)
    return counts


def test_row_01_many_names_that_match_nothing(road: Any, compared: list[int]) -> None:
    """Against a base of as many: what is compared does not grow with them."""
    pair = {"A": torch.zeros(1, 8), "B": torch.zeros(8, 1)}
    names = [f"model.blocks.{i}.attn.qq_proj" for i in range(MANY)]
    held = {f"base_model.model.{name}.lora_{side}.weight": pair[side].clone() for name in names for side in "AB"}
    save_file(held, road.adapter / "adapter_model.safetensors")
    road.config(r=1, target_modules=["qq_proj"])
    road.shard(**{f"model.layers.{i}.self_attn.x_proj.weight": torch.zeros(2, 2) for i in range(2, MANY)})
    road.index(lambda w: w.update({f"model.layers.{i}.self_attn.x_proj.weight": sorted(w.values())[0] for i in range(2, MANY)}))
    with pytest.raises(UnmatchedAdapterError, match=f"none of the {MANY}") as caught:
        lorafold.plan(road.base, [road.adapter])
    assert len(caught.value.unmatched) == MANY
    assert f"… and {MANY - SHOWN} more" in str(caught.value)
    assert len(str(caught.value)) < 200 * SHOWN
    assert sum(compared) <= SHOWN * 300
    assert len(compared) <= 2 * SHOWN


def test_row_05_many_target_modules_that_the_file_lacks(road: Any, compared: list[int]) -> None:
    road.config(target_modules=[f"x{i}_proj" for i in range(MANY)])
    with pytest.raises(AdapterError, match=f"nothing for {MANY} of the {MANY} target_modules") as caught:
        lorafold.plan(road.base, [road.adapter])
    assert f"… and {MANY - SHOWN} more" in str(caught.value)
    assert len(str(caught.value)) < 200 * SHOWN
    assert len(compared) <= 2 * SHOWN


def test_row_02_many_that_are_left_out_are_counted(road: Any) -> None:
    pair = {"A": torch.zeros(2, 8), "B": torch.zeros(8, 2)}
    names = [f"model.layers.{i}.q_proj" for i in range(2, MANY)]
    more = {f"base_model.model.{name}.lora_{side}.weight": pair[side].clone() for name in names for side in "AB"}
    edit_tensors(road.adapter, lambda held: held | more)
    plan = lorafold.plan(road.base, [road.adapter], allow_partial=True)
    assert len(plan.unmatched) == MANY - 2
    assert sum("left out of" in note for note in plan.notes) == SHOWN + 1
    assert f"left out  {MANY - 2} of {MANY + 2} modules of the adapters" in str(plan)


@pytest.mark.parametrize("file", ["base/config.json", "adapter/adapter_config.json"])
def test_a_configuration_beyond_all_measure_is_not_read(road: Any, file: str) -> None:
    path: Path = road.folder / file
    edit_json(path, filler="x" * CONFIG_LIMIT)
    size = path.stat().st_size
    road.refused(file, f"has {size} bytes, more than the {CONFIG_LIMIT} that are read of such a file")
    value = json.loads(path.read_text())
    del value["filler"]
    path.write_text(json.dumps(value) + " " * (CONFIG_LIMIT - len(json.dumps(value))))
    road.merge()


def test_the_nearest_of_many_is_found_all_the_same() -> None:
    names = [f"model.layers.{i}.self_attn.{leaf}_proj" for i in range(2000) for leaf in "qkvo"]
    assert nearest_names("model.layers.1234.self_attn.q_prj", names) == ["model.layers.1234.self_attn.q_proj"]
    assert nearest_names("model.layer.777.self_attn.k_proj", names) == ["model.layers.777.self_attn.k_proj"]
    assert nearest_names("x" * 10**6, ["x" * 10**6]) == []

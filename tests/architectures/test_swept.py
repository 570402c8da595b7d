"""A part of `benchmarks/architectures.py`: types of models whose ties were once guessed wrong or not seen, each case of each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
TYPES = ("mamba", "ctrl", "modernbert", "biogpt", "t5", "llama", "idefics3", "xlnet")


@pytest.fixture(scope="module")
def sweep() -> Any:
    spec = importlib.util.spec_from_file_location("architectures_swept", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TYPES)
def test_merged_files_load_as_what_peft_computes(sweep: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    monkeypatch.setattr(TrainableTokensLayer, "forward_adapters", TrainableTokensLayer.forward_adapters)  # put back after
    sweep.mended()
    found = sweep.examined(name)
    assert {case: why for case, why in found.items() if why[0] in ("refused", "wrong") or case == "build"} == {}
    assert sum(outcome == "right" for outcome, _ in found.values()) >= 5

"""The whole road: what is written, what is left alone, what is refused before a byte is written, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import (
    added,
    copied,
    different,
    edit_json,
    edit_tensors,
    expected,
    peft_edits,
    peft_model,
    plain_adapter,
    plain_base,
    rewritten,
    save_base,
    scaled,
    tensors,
)
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.adapters import AdapterReader
from lorafold.checkpoint import open_checkpoint
from lorafold.errors import (
    AdapterConfigError,
    AdapterError,
    AlreadyMergedError,
    AmbiguousNameError,
    CheckpointError,
    LorafoldError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    PlanError,
    ShapeMismatchError,
    UnmatchedAdapterError,
    UnsupportedAdapterError,
)

Q0 = "model.layers.0.q_proj"
A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


def updates(adapter: Path, weight: float = 1.0) -> dict[str, list[lorafold.LowRankUpdate]]:
    """What a `plain_adapter` adds, read without lorafold's reader: lora_alpha 4, r 2."""
    held = load_file(adapter / "adapter_model.safetensors")
    modules = {name.removesuffix(".lora_A.weight") for name in held if name.endswith(".lora_A.weight")}
    return {
        f"{module.removeprefix('base_model.model.')}.weight": [
            lorafold.LowRankUpdate(held[f"{module}.lora_A.weight"], held[f"{module}.lora_B.weight"], 2.0 * weight)
        ]
        for module in modules
    }


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_of_the_oracle_in_every_dtype_and_of_every_dtype(tmp_path: Path, dtype: torch.dtype, precision: Any) -> None:
    base, adapter = plain_base(tmp_path / "base", dtype=dtype), plain_adapter(tmp_path / "adapter")
    for name, target in (("own", None), ("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32), ("F64", torch.float64)):
        out = tmp_path / name
        lorafold.merge(base, [adapter], out, precision=precision, dtype=None if target is None else name)
        wanted = expected(tensors(base), updates(adapter), {}, target)
        if precision == "exact":
            assert different(tensors(out), wanted) == {}
        else:  # sums of r + 1 = 3 terms in float32 (or better): each term and addition off by 2^-24 of at most 64
            for tensor, value in tensors(out).items():
                assert (value.double() - wanted[tensor].double()).abs().max() <= 64 * 6 * 2.0**-24 + 64 * torch.finfo(value.dtype).eps
        assert json.loads((out / "config.json").read_text())["dtype"] == {
            "own": "bfloat16", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"
        }[name]  # fmt: skip
        assert lorafold.verify(out, base, [adapter]).failures == ()


def test_several_adapters_are_summed_once_and_their_order_changes_no_bit(tmp_path: Path, base: Path) -> None:
    given = [(plain_adapter(tmp_path / f"a{i}", seed=i), weight) for i, weight in enumerate((1.0, 0.7, -0.3))]
    wanted = expected(tensors(base), added(*(updates(path, weight) for path, weight in given)), {})
    for i, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        lorafold.merge(base, [given[j] for j in order], tmp_path / f"out{i}")
        assert different(tensors(tmp_path / f"out{i}"), wanted) == {}
        assert lorafold.verify(tmp_path / f"out{i}", base, given).failures == ()  # in whatever order they are given
    assert lorafold.verify(tmp_path / "out0", base, given[:2]).failures
    assert lorafold.verify(tmp_path / "out0", base, [*given[:2], (given[2][0], -0.2)]).failures

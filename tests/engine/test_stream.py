"""Blocks that go from file to file in one pass: the files that they give by way of memory, and what stops them told as there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.engine import produce as passing
from lorafold.errors import CheckpointError, NonFiniteError, OutputError
from lorafold.kernel.cpu import rowwise, stream
from lorafold.kernel.cpu.loader import build
from models import gpt2, llama, plain_adapter, plain_base, save_adapter, save_base

pytestmark = pytest.mark.skipif(
    (used := build()) is None or used.stream() is None,
    reason="no compiled code for files: no C compiler at installation, LORAFOLD_NATIVE=0, or no pread",
)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Blocks of every size go that way, as few rows at a time as can; of each its rows, and how many went well."""
    seen: list[tuple[int, int]] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(source: Any, rows: int, *args: Any, **options: Any) -> Any:
            done, kept = real(source, rows, *args, **options)
            seen.append((rows, done))
            return done, kept

        return counting

    monkeypatch.setattr(passing, "LEAST", 0)
    for name in ("merge_between", "multiply_between", "rescale_between"):
        monkeypatch.setattr(passing, name, counted(getattr(passing, name)))
    monkeypatch.setattr(stream, "_MOST", 1)
    monkeypatch.setattr(rowwise, "_THROUGH", 1)
    return seen


def whole(rows: int) -> int:
    """Rows that went through before one that stops it, which `rows` are before."""
    used = build()
    return 0 if used is None else rows - rows % used.number("rows")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


LLAMA = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": LLAMA}),
    "with biases": (lambda: llama(bias=True), {"target_modules": LLAMA, "bias": "lora_only"}),
    "stored transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "with an embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "o_proj"]}),
    "with trained modules": (llama, {"target_modules": LLAMA, "modules_to_save": ["lm_head"]}),
    "DoRA": (llama, {"target_modules": LLAMA, "use_dora": True}),
    "DoRA, transposed": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "DoRA of an embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True}),
}


@pytest.mark.parametrize("dtype", [None, "F16", "F32", "F64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files(tmp_path: Path, kind: str, dtype: str | None, passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    make, config = KINDS[kind]
    base = save_base(make(), tmp_path / "base")
    adapter = save_adapter(make(), tmp_path / "adapter", **config)
    report = lorafold.merge(base, [adapter], tmp_path / "one", dtype=dtype)
    assert report.proof is not None
    assert report.proof.share == 1
    assert all(rows == done for rows, done in passed)
    assert passed
    monkeypatch.setattr(passing, "LEAST", 1 << 40)
    seen = len(passed)
    lorafold.merge(base, [adapter], tmp_path / "other", dtype=dtype)
    assert len(passed) == seen
    assert files(tmp_path / "one") == files(tmp_path / "other")
    monkeypatch.setattr(passing, "LEAST", 0)
    assert lorafold.verify(tmp_path / "other", base, [adapter]).share == 1


@pytest.mark.parametrize("options", [{"rounding": "stochastic"}, {"precision": "fast"}, {"threads": 1}])
def test_with_options(tmp_path: Path, options: dict[str, Any], passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    lorafold.merge(base, [adapter], tmp_path / "one", **options)
    assert passed == [(40, 40)] * len(passed) != []
    monkeypatch.setattr(passing, "LEAST", 1 << 40)
    lorafold.merge(base, [adapter], tmp_path / "other", **options)
    assert files(tmp_path / "one") == files(tmp_path / "other")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_several_outputs(tmp_path: Path, rounding: Any, passed: list[Any]) -> None:
    """They are written together, from rows that are read once, and proven one by one."""
    base = plain_base(tmp_path / "base", size=40)
    adapters = [plain_adapter(tmp_path / f"a{i}", size=40, seed=i) for i in range(2)]
    (tmp_path / "outs").mkdir()
    lorafold.merge_each(base, adapters, tmp_path / "outs", rounding=rounding)
    assert passed == [(40, 40)] * (4 + 2 * 4)
    for i, adapter in enumerate(adapters):
        lorafold.merge(base, [adapter], tmp_path / f"alone{i}", rounding=rounding)
        assert files(tmp_path / "outs" / f"a{i}") == files(tmp_path / f"alone{i}")


def test_several_outputs_of_which_some_rescale(tmp_path: Path, passed: list[Any]) -> None:
    """Each goes by itself then; one of them, of DoRA and a plain adapter, by stages."""
    base = save_base(llama(), tmp_path / "base")
    plain, dora = (
        save_adapter(llama(), tmp_path / name, seed=i, target_modules=LLAMA, use_dora=name == "dora")
        for i, name in enumerate(("plain", "dora"))
    )
    (tmp_path / "outs").mkdir()
    lorafold.merge_each(base, [plain, dora], tmp_path / "outs")
    assert passed
    assert all(rows == done for rows, done in passed)
    for adapter in (plain, dora):
        lorafold.merge(base, [adapter], tmp_path / f"alone {adapter.name}")
        assert files(tmp_path / "outs" / adapter.name) == files(tmp_path / f"alone {adapter.name}")
    report = lorafold.merge(base, [plain, (dora, 0.5)], tmp_path / "both")
    assert report.proof is not None
    assert report.proof.share == 1


def test_what_overflows_where_rows_are_rescaled(tmp_path: Path, passed: list[Any]) -> None:
    """It is named, as where it is only added."""
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], use_dora=True)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    name = next(name for name in held if name.endswith("lora_magnitude_vector"))
    held[name][5] = 1e6
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight.*after merging into F16, the first at \[5, "):
        lorafold.merge(base, [adapter], tmp_path / "out", dtype="F16")
    assert any(done < rows for rows, done in passed)


def test_of_several_outputs_one_overflows(tmp_path: Path, passed: list[Any]) -> None:
    """What the others wrote of those rows does not count either."""
    base = plain_base(tmp_path / "base", size=40)
    adapters = [plain_adapter(tmp_path / f"a{i}", size=40, seed=i) for i in range(3)]
    file = adapters[1] / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.model.model.layers.1.v_proj.lora_B.weight"][29] = 3e5
    save_file(held, file, metadata={"format": "pt"})
    (tmp_path / "outs").mkdir()
    with pytest.raises(NonFiniteError, match=r"layers\.1\.v_proj\.weight.*after merging into F16, the first at \[29, "):
        lorafold.merge_each(base, adapters, tmp_path / "outs", dtype="F16", verify=False)
    assert (40, whole(29)) in passed
    assert not any(not path.name.startswith(".") for path in (tmp_path / "outs").iterdir())


def edited(base: Path, value: float) -> None:
    """Put `value` into row 29 of a weight."""
    file = base / "model-00002-of-00002.safetensors"
    held = load_file(file)
    held["model.layers.1.q_proj.weight"][29, 3] = value
    save_file(held, file, metadata={"format": "pt"})


@pytest.mark.parametrize("large", [False, True])
def test_what_is_not_finite_is_refused(tmp_path: Path, large: bool, passed: list[Any]) -> None:
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    edited(base, 3e38 if large else float("nan"))
    where = "after merging into F16" if large else "in the base"
    with pytest.raises(NonFiniteError, match=rf"layers\.1\.q_proj\.weight.*{where}.*the first at \[29, 3\]"):
        lorafold.merge(base, [adapter], tmp_path / "out", dtype="F16" if large else None)
    assert (40, whole(29)) in passed
    assert not (tmp_path / "out").exists()


def test_what_is_clamped_is_as_elsewhere(tmp_path: Path, passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    edited(base, 3e38)
    options = {"dtype": "F16", "on_overflow": "clamp"}
    report = lorafold.merge(base, [adapter], tmp_path / "one", **options)
    assert (40, whole(29)) in passed
    monkeypatch.setattr(passing, "LEAST", 1 << 40)
    other = lorafold.merge(base, [adapter], tmp_path / "other", **options)
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert report.clamped == other.clamped == {"model.layers.1.q_proj.weight": 1}


@pytest.mark.parametrize("row", [0, 13, 39])
def test_one_wrong_element_is_named(tmp_path: Path, row: int, passed: list[Any]) -> None:
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    lorafold.merge(base, [adapter], tmp_path / "out")
    file = tmp_path / "out" / "model-00001-of-00002.safetensors"
    held = load_file(file)
    held["model.layers.0.v_proj.weight"].view(torch.int16)[row, 7] ^= 1
    held["model.layers.0.v_proj.weight"].view(torch.int16)[39, 8] ^= 1
    save_file(held, file, metadata={"format": "pt"})
    passed.clear()
    proof = lorafold.verify(tmp_path / "out", base, [adapter])
    (failure,) = [each for each in proof.failures if "v_proj.weight" in each]
    assert "v_proj.weight differs in " in failure
    assert f"the first at [{row}, 7]" in failure
    assert (40, whole(row)) in passed


def test_a_base_that_ends_is_named(tmp_path: Path, passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    counted = passing.merge_between

    def truncating(source: Any, *args: Any, **options: Any) -> Any:
        os.truncate(f"/proc/self/fd/{source.fd}", source.start + 17 * source.row_bytes)
        return counted(source, *args, **options)

    monkeypatch.setattr(passing, "merge_between", truncating)
    with pytest.raises(CheckpointError, match="was truncated while it was read"):
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert (40, whole(17)) in passed
    assert not (tmp_path / "out").exists()


def test_a_disk_that_refuses_is_named(tmp_path: Path, passed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code says nothing of it: the next write does."""
    base, adapter = plain_base(tmp_path / "base", size=40), plain_adapter(tmp_path / "adapter", size=40)
    counted = passing.merge_between

    def refused(source: Any, rows: int, *args: Any, **options: Any) -> Any:
        found = counted(source, 16, *args, **options)
        monkeypatch.setattr(os, "pwrite", full)
        return found

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(passing, "merge_between", refused)
    with pytest.raises(OutputError, match="No space left on device"):
        lorafold.merge(base, [adapter], tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert lorafold.merge(base, [adapter], tmp_path / "out").proof is not None

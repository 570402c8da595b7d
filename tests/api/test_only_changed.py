"""An overlay: the tensors that a merge changes, and nothing else of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafold
from lorafold.errors import CheckpointError, InputError, PlanError, VerificationError
from models import llama, save_adapter, save_base, tensors


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("overlay")
    return save_base(llama(), folder / "base"), save_adapter(llama(), folder / "adapter", target_modules=["q_proj", "down_proj"])


def test_the_base_with_the_overlay_over_it_is_the_merged_checkpoint(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "whole")
    report = lorafold.merge(base, [adapter], tmp_path / "over", only_changed=True)
    over = tensors(tmp_path / "over")
    assert (
        over.keys()
        == {step.tensor for step in report.plan.steps}
        == {n for n in tensors(base) if "q_proj" in n or "down_proj" in n}
    )
    whole = tensors(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in (tensors(base) | over).items())
    beside = {path.name for path in (tmp_path / "over").iterdir() if path.suffix != ".safetensors"}
    assert beside == {"README.md", "lorafold.json", "model.safetensors.index.json"}


def test_it_is_proven_and_tied_to_its_base(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "over", only_changed=True)
    assert lorafold.verify(tmp_path / "over", base, [adapter]).failures == ()
    assert lorafold.verify(tmp_path / "over").failures == ()
    other = save_base(llama(seed=8, layers=3), tmp_path / "other")
    assert lorafold.verify(tmp_path / "over", other, [adapter]).failures
    file = next((tmp_path / "over").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert lorafold.verify(tmp_path / "over", base, [adapter]).failures


def test_it_is_not_taken_for_a_whole_model(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "over", only_changed=True)
    with pytest.raises(CheckpointError, match="no whole model"):
        lorafold.merge(tmp_path / "over", [(adapter, 0.5)], tmp_path / "again", merge_again=True)
    with pytest.raises(InputError, match="the base is where it was"):
        lorafold.unmerge(tmp_path / "over", tmp_path / "restored", base=base)
    with pytest.raises(PlanError, match="undo"):
        lorafold.merge(base, [adapter], tmp_path / "undone", only_changed=True, undo=tmp_path / "undo")


def test_what_changes_the_configuration_is_refused(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    with pytest.raises(PlanError, match="dtype"):
        lorafold.merge(base, [adapter], tmp_path / "over", only_changed=True, dtype="F32")
    assert not (tmp_path / "over").exists()


def test_without_verification_there_are_no_hashes(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "over", only_changed=True, verify=False)
    with pytest.raises(VerificationError, match="no hashes"):
        lorafold.verify(tmp_path / "over")
    assert lorafold.verify(tmp_path / "over", base, [adapter]).failures == ()

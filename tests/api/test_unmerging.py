"""The base comes back bit for bit from the base alone, held to the merged checkpoint; nothing is subtracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import CheckpointError, InputError, OutputError, VerificationError
from models import copied, edit_json, plain_adapter, plain_base

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    plain_base(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("the base's own")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    plain_adapter(tmp_path / "adapter")
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_base_comes_back_byte_for_byte(folder: Path) -> None:
    lorafold.unmerge(folder / "out", folder / "restored", base=folder / "base")
    assert content(folder / "restored") == content(folder / "base")
    lorafold.merge(folder / "base", [folder / "adapter"], folder / "resharded", dtype="F32", max_shard_size=100)
    lorafold.unmerge(folder / "resharded", folder / "restored", base=folder / "base", overwrite=True)
    assert content(folder / "restored") == content(folder / "base")


def test_without_the_base_it_is_refused_and_said_why(folder: Path) -> None:
    with pytest.raises(InputError, match="misses the base in about one element of ten") as caught:
        lorafold.unmerge(folder / "out", folder / "restored")
    assert "base=BASE" in str(caught.value)


def test_a_receipt_that_was_changed_is_not_believed(folder: Path) -> None:
    """Whatever was changed in it: it says what the base is held to."""
    receipt = folder / "out" / "lorafold.json"
    edit_json(receipt, base=json.loads(receipt.read_text())["base"] | {"name": "another"})
    with pytest.raises(VerificationError, match=r"lorafold\.json"):
        lorafold.unmerge(folder / "out", folder / "restored", base=folder / "base")
    assert not (folder / "restored").exists()


@pytest.mark.parametrize("change", ["header", "norm", "damaged"])
def test_another_base_is_refused(folder: Path, change: str) -> None:
    other = copied(folder / "base", folder / "other")
    held = {name: tensor.clone() for name, tensor in load_file(other / SHARD).items()}
    error: Any = CheckpointError
    if change == "header":
        held["model.layers.0.q_proj.weight"] = torch.zeros(8, 9).bfloat16()
    elif change == "norm":
        held["model.layers.0.norm.weight"][3] += 1
    save_file(held, other / SHARD, metadata={"format": "pt"})
    said = {"header": "fingerprint", "norm": "'model.layers.0.norm.weight', which merging did not change, differs"}.get(
        change, "model-00001-of-00002.safetensors"
    )
    if change == "damaged":
        (folder / "out" / SHARD).write_bytes(b"")
        error = VerificationError
    with pytest.raises(error, match=said):
        lorafold.unmerge(folder / "out", folder / "restored", base=other)
    assert not (folder / "restored").exists()


def test_inputs_are_never_the_output(folder: Path) -> None:
    for name in ("base", "out"):
        with pytest.raises(OutputError, match="cannot be the output"):
            lorafold.unmerge(folder / "out", folder / name, base=folder / "base", overwrite=True)
    edit_json(folder / "base" / "config.json", more=1)  # beside the weights: not what the fingerprint is of
    lorafold.unmerge(folder / "out", folder / "restored", base=folder / "base")

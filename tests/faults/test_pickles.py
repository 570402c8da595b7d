"""Rows 39 and 40: files of torch.save are refused unless they are asked for, and then nothing in them is run, nor unfolded."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models import different, tensors

A0 = "base_model.model.model.layers.0.q_proj.lora_A.weight"


class Bomb:
    """What a malicious pickle holds: a call of `os.mkdir`."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


class Evaluated(Bomb):
    def __reduce__(self) -> Any:
        return eval, ("__import__('os').mkdir('owned')",)


@pytest.fixture
def pickled(road: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The adapter's tensors, which stand in no file; the working directory is the road's."""
    monkeypatch.chdir(road.folder)
    held = load_file(road.adapter / "adapter_model.safetensors")
    (road.adapter / "adapter_model.safetensors").unlink()
    return {name: tensor.clone() for name, tensor in held.items()}


def saved(road: Any, value: Any, name: str = "adapter_model.bin") -> Path:
    file: Path = road.adapter / name
    torch.save(value, file)
    return file


def test_row_39_refused_unless_asked_for_then_the_same_bits(road: Any, pickled: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    saved(road, pickled)
    said = road.refused("adapter_model.bin", "a pickle", "may run code", "--allow pickle")
    assert "weights_only" in said
    road.merge("--allow", "pickle")
    found = tensors(road.out)
    (road.adapter / "adapter_model.bin").unlink()
    save_file(pickled, road.adapter / "adapter_model.safetensors")
    road.merge("--overwrite")
    assert different(found, tensors(road.out)) == {}


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("form", ["bare", "in the archive", "beside the tensors", "evaluated", "old"])
def test_row_39_nothing_in_a_pickle_is_run(road: Any, pickled: dict[str, torch.Tensor], form: str, allowed: bool) -> None:
    file = road.adapter / "adapter_model.bin"
    if form == "bare":
        file.write_bytes(pickle.dumps(Bomb()))
    elif form == "in the archive":
        saved(road, pickled)
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, pickle.dumps(Bomb()) if name.endswith("data.pkl") else data)
    elif form == "old":
        torch.save({**pickled, "x": Bomb()}, file, _use_new_zipfile_serialization=False)
    else:
        saved(road, {**pickled, "x": Bomb() if form == "beside the tensors" else Evaluated()})
    road.refused("adapter_model.bin", options=("--allow", "pickle") if allowed else ())
    assert not (road.folder / "owned").exists()


def test_row_39_no_second_way_of_loading(road: Any, pickled: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads calls torch.load with weights_only, once; a damaged file is an error and not read another way."""
    calls = []
    real = torch.load

    def watched(*args: Any, **named: Any) -> Any:
        calls.append(named.get("weights_only"))
        return real(*args, **named)

    monkeypatch.setattr(torch, "load", watched)
    file = saved(road, pickled)
    data = file.read_bytes()
    for damaged in (data[:-30], data[:200], data[:100] + b"\xff" * 8 + data[108:], b"", b"junk" * 50):
        file.write_bytes(damaged)
        road.refused("adapter_model.bin", options=("--allow", "pickle"))
    assert set(calls) <= {True}


def test_row_39_a_base_that_is_a_pickle(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road.folder)
    for file in road.base.glob("*.safetensors*"):
        file.unlink()
    (road.base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for options in ((), ("--allow", "pickle")):
        road.refused("has no .safetensors file, only", "pytorch_model.bin", "convert the weights", options=options)
    assert not (road.folder / "owned").exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_row_40_a_view_that_would_unfold(road: Any, pickled: dict[str, torch.Tensor], allowed: bool) -> None:
    """4 TB of a few bytes, and one of a megabyte of 32 bytes: the storage is looked at before anything is made of it."""
    options = ("--allow", "pickle") if allowed else ()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for view in (
        torch.zeros(1).expand(1 << 40).view(2, -1),
        torch.zeros(8)[None].expand(1 << 17, 8),
        torch.zeros(8).as_strided((1 << 20, 1 << 20), (0, 0)),
    ):
        saved(road, {**pickled, A0: view})
        said = road.refused("adapter_model.bin", options=options)
        if allowed:
            assert A0 in said or "q_proj" in said
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200_000_000


def test_row_40_a_base_that_would_unfold_is_never_opened(road: Any) -> None:
    for file in road.base.glob("*.safetensors*"):
        file.unlink()
    torch.save({"model.layers.0.q_proj.weight": torch.zeros(1).expand(1 << 40)}, road.base / "pytorch_model.bin")
    road.refused("pytorch_model.bin")

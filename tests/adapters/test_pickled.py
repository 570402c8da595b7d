"""Files of torch.save: places that hold what torch loads, and one typed error for whatever is damaged or hostile."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.adapters import pickles as pickled
from lorafold.adapters.pickles import read_pickled
from lorafold.errors import AdapterError, InputError, UnsupportedAdapterError
from lorafold.files.safetensors.reader import TensorFile

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_read_is_what_torch_loads(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("pickled") / "a.pt"
    held: dict[str, torch.Tensor] = {}
    whole = torch.randn(40)
    for i in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        tensor = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        start = data.draw(st.integers(0, 39))
        held[f"t{i}"] = data.draw(st.sampled_from([tensor, torch.nn.Parameter(torch.randn(shape)), whole[start:]]))
    torch.save(data.draw(st.sampled_from([held, {"state_dict": held}])), path)
    header = read_pickled(path)
    assert header.tensors.keys() == held.keys()
    with TensorFile(header) as file:
        for name, tensor in held.items():
            assert torch.equal(file.read(header.tensors[name]), tensor.detach())


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def archive(path: Path, content: bytes, **more: Any) -> None:
    with zipfile.ZipFile(path, "w", **more) as file:
        file.writestr("a/data.pkl", content)
        file.writestr("a/byteorder", "little")
        file.writestr("a/data/0", b"\0" * 64)
        file.writestr("a/version", "3\n")


def test_a_hostile_pickle_is_never_run(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    for content in (Bomb(str(owned)), {"a": Bomb(str(owned))}, {"a": torch.ones(2), "b": pickle.Unpickler}):
        archive(tmp_path / "a.pt", pickle.dumps(content, protocol=2))
        with pytest.raises(AdapterError, match="more than tensors"):
            read_pickled(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(str(owned))))
    with pytest.raises(AdapterError, match=r"not a file of torch\.save"):
        read_pickled(tmp_path / "b.pt")
    assert not owned.exists()


def test_forms_that_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match=r"not a file of torch\.save since torch 1\.6"):
        read_pickled(path)
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(AdapterError, match="compressed"):
        read_pickled(tmp_path / "c.pt")
    for value, words in (([torch.ones(2)], "dictionary"), ({"a": 3}, "'a' must be a tensor"), ({1: torch.ones(1)}, "'1' must be")):
        torch.save(value, path)
        with pytest.raises(AdapterError, match=words):
            read_pickled(path)
    torch.save({"a": torch.ones(2)}, path)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UnsupportedAdapterError, match=r"torch 2\.10 or newer"):
        read_pickled(path)
    assert pickled.TORCH_NEEDED == (2, 10)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_changes_nothing(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    held = {"fc.lora_A": torch.arange(6.0).view(2, 3), "fc.lora_B": torch.ones(4, 2).half()}
    torch.save(held, path)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(raw)
    try:
        header = read_pickled(path)
    except InputError:
        return
    assert all(info.stop <= len(raw) for info in header.tensors.values())

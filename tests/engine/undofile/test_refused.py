"""An undo file that is damaged, of another merge, or in the wrong place: refused, with nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.cli.main import main
from lorafold.errors import CheckpointError, InputError, LorafoldError, OutputError, OutputExistsError, VerificationError
from lorafold.files.atomic.file import StagedFile
from lorafold.files.atomic.folder import StagedFolder
from models import copied, plain_adapter, plain_base

SHARD = "model-00001-of-00002.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "a")
    lorafold.merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", undo=tmp_path / "undo")
    return tmp_path


def refused(here: Path, error: type[LorafoldError], said: str, *, undo: str = "undo", out: str = "out") -> LorafoldError:
    before = sorted(os.listdir(here))
    with pytest.raises(error, match=said) as caught:
        lorafold.unmerge(here / out, here / "again", undo=here / undo)
    assert type(caught.value) is error
    assert sorted(os.listdir(here)) == before
    return caught.value


def test_any_damage_is_seen_or_does_no_harm(here: Path) -> None:
    """One byte changed at every twentieth place of the file: refused with exit code 3, or the base all the same."""
    whole, wanted = (here / "undo").read_bytes(), content(here / "base")
    harmless, codes = 0, set[int]()
    for place in range(0, len(whole), 20):
        data = bytearray(whole)
        data[place] ^= 1 << (place // 20 % 8)
        (here / "undo").write_bytes(data)
        try:
            lorafold.unmerge(here / "out", here / "again", undo=here / "undo")
        except LorafoldError as error:
            codes.add(error.exit_code)
            codes.add(3 + (here / "again").exists())
            continue
        harmless += 1
        assert content(here / "again") == wanted
        shutil.rmtree(here / "again")
    assert codes == {3}
    assert harmless < len(whole) // 20 / 4  # padding and what is only for people


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_cut_short(here: Path, length: int) -> None:
    data = (here / "undo").read_bytes()
    (here / "undo").write_bytes(data[:length])
    assert refused(here, VerificationError, "undo").exit_code == 3


def test_what_is_no_undo_file(here: Path) -> None:
    refused(here, VerificationError, "is not an undo file", undo=f"base/{SHARD}")
    refused(here, CheckpointError, "no such file", undo="gone")
    with pytest.raises(InputError, match="one of them is enough"):
        lorafold.unmerge(here / "out", here / "again", undo=here / "undo", base=here / "base")


def test_of_another_merge_or_of_files_that_changed(here: Path) -> None:
    lorafold.merge(here / "base", [(here / "a", 0.5)], here / "other")
    assert refused(here, VerificationError, "is not the undo file of", out="other").exit_code == 3
    copied(here / "out", here / "edited")
    held = {name: tensor.clone() for name, tensor in load_file(here / "edited" / SHARD).items()}
    held["model.layers.0.norm.weight"][0] += 1
    save_file(held, here / "edited" / SHARD, metadata={"format": "pt"})
    error = refused(here, VerificationError, "is not as it was written", out="edited")
    assert f"{SHARD} has sha256" in str(error)


def test_a_merged_tensor_changed_with_its_hashes(here: Path) -> None:
    """Whoever changes a weight and every hash that speaks of it still cannot have another base restored."""
    import hashlib

    file = here / "out" / SHARD
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    held["model.layers.0.q_proj.weight"][3, 3] += 1
    save_file(held, file, metadata={"format": "pt"})
    receipt = json.loads((here / "out" / "lorafold.json").read_text())
    receipt["files"][SHARD] = hashlib.sha256(file.read_bytes()).hexdigest()
    (here / "out" / "lorafold.json").write_text(json.dumps(receipt))
    from safetensors import safe_open

    with safe_open(here / "undo", "pt") as opened:
        metadata = dict(opened.metadata())
    said = json.loads(metadata["lorafold_undo"])
    said["receipt"] = hashlib.sha256((here / "out" / "lorafold.json").read_bytes()).hexdigest()
    said["output"][SHARD] = receipt["files"][SHARD]
    text = json.dumps(said)
    remarks = {"lorafold_undo": text, "lorafold_undo_sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(load_file(here / "undo"), here / "undo", metadata=metadata | remarks)
    refused(here, VerificationError, "'model.layers.0.q_proj.weight' does not come out with the bytes that it had before merging")


def merged_again(here: Path, **options: Any) -> Any:
    return lorafold.merge(here / "base", [here / "a"], here / "two", **options)


def test_where_it_may_not_be(here: Path) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for place, error, said in (
        ("undo", OutputExistsError, "exists"),
        ("base/undo", OutputError, "lies in the input"),
        (f"base/{SHARD}", OutputError, "it is the input|lies in the input"),
        ("a/undo", OutputError, "lies in the input"),
        ("two", OutputError, "is or lies in the output"),
        ("two/undo", OutputError, "is or lies in the output|no folder"),
        ("gone/undo", OutputError, "there is no folder"),
        ("out", OutputExistsError, "is not a file"),
    ):
        with pytest.raises(error, match=said):
            merged_again(here, undo=here / place, rounding="stochastic")
        assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    (here / "thesis").write_text("not ours")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            merged_again(here, undo=here / "thesis", overwrite=overwrite)
    assert (here / "thesis").read_text() == "not ours"


def test_a_merge_that_fails_leaves_no_undo_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = sorted(os.listdir(here)), list[bool]()

    def failing(self: StagedFolder) -> None:
        seen.append((here / "second").exists())  # it is in place before the output is
        raise OutputError("refused")

    monkeypatch.setattr(StagedFolder, "commit", failing)
    with pytest.raises(OutputError, match="refused"):
        merged_again(here, undo=here / "second")
    assert seen == [True]
    left = {name for name in os.listdir(here) if name.startswith(".two.lorafold-")}  # finished files, to go on from
    assert sorted(set(os.listdir(here)) - left) == before
    old = (here / "undo").read_bytes()
    with pytest.raises(OutputError, match="refused"):
        merged_again(here, undo=here / "undo", overwrite=True, rounding="stochastic", restart=True)
    assert (here / "undo").read_bytes() == old
    monkeypatch.undo()
    merged_again(here, undo=here / "undo", overwrite=True, rounding="stochastic", restart=True)
    assert (here / "undo").read_bytes() != old
    lorafold.unmerge(here / "two", here / "again", undo=here / "undo")
    assert content(here / "again") == content(here / "base")
    assert sorted(os.listdir(here)) == sorted([*before, "two", "again"])


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_disk_refuses_the_undo_file(here: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the calls that concern the undo file fail; one clear error, and neither it nor the output is there."""
    real = getattr(os, call)
    file = here / "second"

    def failing(first: Any, *rest: Any, **named: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if ".second.lorafold-" in path:
            raise OSError(number, os.strerror(number))
        return real(first, *rest, **named)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OutputError, match=f"second.*{os.strerror(number)}"):
        merged_again(here, undo=file)
    monkeypatch.undo()
    assert not file.exists()
    assert not (here / "two").exists()
    assert not list(here.glob(".second*"))
    merged_again(here, undo=file)
    assert not list(here.glob(".*lorafold-*"))


def test_a_wrong_undo_is_seen_before_anything_appears(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lorafold.engine.undofile.write_undo as write

    real = write.encode

    def wrong(base: Any, merged: Any, updates: Any) -> Any:
        base = base.clone()
        base[0, 0] += 1
        return real(base, merged, updates)

    monkeypatch.setattr(write, "encode", wrong)
    before = sorted(os.listdir(here))
    with pytest.raises(VerificationError, match="does not give back the base"):
        merged_again(here, undo=here / "second")
    assert sorted(os.listdir(here)) == before


KILLED = """
import os, signal, sys
import lorafold
from lorafold.files.atomic.file import StagedFile
from lorafold.files.atomic.folder import StagedFolder
def deadly(self):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "before":
    StagedFile.place = deadly
else:
    StagedFolder.commit = deadly
lorafold.merge(sys.argv[2], [sys.argv[3]], sys.argv[4], undo=sys.argv[5])
"""


@pytest.mark.parametrize("when", ["before", "between"])
def test_row_42_killed_the_same_call_gives_both(here: Path, when: str) -> None:
    arguments = [str(here / name) for name in ("base", "a", "two", "second")]
    done = subprocess.run([sys.executable, "-c", KILLED, when, *arguments], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (here / "two").exists()
    assert (here / "second").exists() is (when == "between")
    if when == "between":  # another merge does not take its place
        with pytest.raises(OutputExistsError):
            lorafold.merge(here / "base", [(here / "a", 2.0)], here / "three", undo=here / "second")
    merged_again(here, undo=here / "second")
    assert (here / "second").read_bytes()[-100:] == (here / "undo").read_bytes()[-100:]
    lorafold.unmerge(here / "two", here / "again", undo=here / "second")
    assert content(here / "again") == content(here / "base")
    assert not list(here.glob(".*lorafold-*"))


def test_two_merges_write_to_one_undo_file(here: Path) -> None:
    with StagedFile(here / "second"), pytest.raises(OutputError, match="another merge is writing to"):
        merged_again(here, undo=here / "second")


def test_the_command_line(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(here)

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    code, out, err = run("merge", "base", "a", "-o", "two", "--undo", "second")
    assert (code, err) == (0, "")
    assert "  undo      second, " in out
    code, out, err = run("unmerge", "two", "--undo", "second", "-o", "again")
    assert (code, err) == (0, "")
    assert out.startswith("again is the base of two, bit for bit\n  from      second\n  written   544 B, ")
    assert content(here / "again") == content(here / "base")
    report = json.loads(run("merge", "base", "a", "-o", "three", "--undo", "third", "--json")[1])
    assert report["undo"] == {"path": "third", "bytes": (here / "third").stat().st_size}
    assert json.loads(run("unmerge", "three", "--undo", "third", "-o", "more", "--json")[1])["undo"] == "third"
    data = bytearray((here / "third").read_bytes())
    data[-1] ^= 0xFF
    (here / "third").write_bytes(data)
    code, out, err = run("unmerge", "three", "--undo", "third", "-o", "no")
    assert (code, out) == (3, "")
    assert "VerificationError" in err
    code, _, err = run("unmerge", "two", "-o", "no")
    assert code == 1
    assert "misses the base in about one element of ten" in err
    assert "--undo FILE" in err
    assert not (here / "no").exists()


def test_it_is_a_safetensors_file(here: Path) -> None:
    held = load_file(here / "undo")
    factors = load_file(here / "a" / "adapter_model.safetensors")
    name = "model.layers.1.v_proj"
    for kind in ("lora_A", "lora_B"):
        assert np.array_equal(held[f"{kind}/0.0/{name}.weight"], factors[f"base_model.model.{name}.{kind}.weight"])

"""Hashes that say how they were made, and a merge whose receipt has them."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import lorafold
from lorafold.errors import InputError, LorafoldError
from lorafold.files.digests import algorithm_of, hash_of, new_digest, written
from models import llama, save_adapter, save_base

NEEDED = "blake3 is not installed"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("given")
    return save_base(llama(), folder / "base"), save_adapter(llama(), folder / "adapter", target_modules="all-linear")


def test_blake3_is_that_of_its_paper(tmp_path: Path) -> None:
    """The hash of nothing, and of 102 400 bytes 0 … 250 again and again (BLAKE3, test_vectors.json)."""
    pytest.importorskip("blake3", reason=NEEDED)
    (tmp_path / "file").write_bytes(bytes(i % 251 for i in range(102400)))
    assert hash_of(tmp_path / "file", "blake3") == "blake3:bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085"
    empty = written("blake3", new_digest("blake3"))
    assert empty == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert algorithm_of(empty) == "blake3"


def test_sha256_stands_as_others_write_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert hash_of(tmp_path / "file", "sha256") == hashlib.sha256(b"abc").hexdigest()
    assert algorithm_of(hashlib.sha256(b"abc").hexdigest()) == "sha256"


def test_a_merge_hashed_by_blake3(given: tuple[Path, Path], tmp_path: Path) -> None:
    """Its receipt says so; verified, unmerged and gone on with it is by the same hashes, and damage is found."""
    pytest.importorskip("blake3", reason=NEEDED)
    base, adapter = given
    out, undo = tmp_path / "out", tmp_path / "undo.safetensors"
    plain = lorafold.merge(base, [adapter], tmp_path / "plain")
    report = lorafold.merge(base, [adapter], out, hash="blake3", undo=undo)
    assert report.proof is not None
    assert plain.proof is not None
    stated = json.loads((out / "lorafold.json").read_text())["files"]
    assert stated == report.proof.files
    assert stated == {name: hash_of(out / name, "blake3") for name in stated}
    assert {name: hash_of(out / name, "sha256") for name in stated} == plain.proof.files
    assert lorafold.verify(out).ok
    assert lorafold.verify(out, base, [adapter]).ok
    lorafold.unmerge(out, tmp_path / "restored", undo=undo)
    for file in base.glob("*.safetensors"):
        assert (tmp_path / "restored" / file.name).read_bytes() == file.read_bytes()
    name = next(iter(stated))
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    by_receipt, replayed = lorafold.verify(out), lorafold.verify(out, base, [adapter])
    assert any(f"{name} has blake3 " in failure and stated[name] in failure for failure in by_receipt.failures)
    assert any("differs" in failure for failure in replayed.failures)
    assert any("its blake3 of" in failure for failure in replayed.failures)
    with pytest.raises(LorafoldError, match="is not as it was written"):
        lorafold.unmerge(out, tmp_path / "again", undo=undo)


def test_without_the_package_nothing_is_begun(given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    options: Any = {"hash": "blake3"}
    with pytest.raises(InputError, match=r"(?s)needs the package blake3.*hint: pip install .lorafold\[blake3\]."):
        lorafold.merge(given[0], [given[1]], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())

"""Hashes begun ahead of a second run: of what the journal lists, and never taken for a file that has changed since."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from lorafold.errors import InputError
from lorafold.files.atomic import prehash
from lorafold.files.atomic.folder import hidden_prefix
from lorafold.files.atomic.journal import Finished, begin_journal
from lorafold.files.atomic.prehash import begin_to_hash, sha256_found


def left(out: Path, *texts: str, hashed: bool = True) -> list[Path]:
    """Files of a stopped run for `out`, and its journal."""
    folder = out.parent / f"{hidden_prefix(out)}1-0123abcd"
    folder.mkdir()
    paths = [folder / f"{i}.safetensors" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    begin_journal(folder, {}, [Finished(path.name, "0" * 64 if hashed else "", True) for path in paths])
    return paths


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = left(tmp_path / "out", "one", "two")
    begin_to_hash(tmp_path / "out")
    expected = [sha256("one"), sha256("two")]
    for path in paths:
        prehash._begun[path][1].result()
    with monkeypatch.context() as patch:
        patch.setattr(prehash, "sha256_of", None)
        assert [sha256_found(path) for path in paths] == expected
    assert [sha256_found(path) for path in paths] == expected  # read now


def test_a_file_that_changed_since_is_read_again(tmp_path: Path) -> None:
    (path,) = left(tmp_path / "out", "one")
    begin_to_hash(tmp_path / "out")
    prehash._begun[path][1].result()
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same inode, same time of change
    assert sha256_found(path) == sha256("two")


def test_what_is_far_from_its_turn_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = left(tmp_path / "out", *map(str, range(9)))
    monkeypatch.setattr(prehash, "_follow", lambda process, begun: (process.kill(), process.communicate()))  # says nothing
    begin_to_hash(tmp_path / "out")
    for future in (prehash._begun[path][1] for path in paths[:1]):
        future.set_result("")
    assert [sha256_found(path) for path in reversed(paths[2:])] == [sha256(str(i)) for i in reversed(range(2, 9))]


def test_the_program_ends_when_nobody_wants_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []
    monkeypatch.setattr(prehash.subprocess, "Popen", lambda *a, **k: processes.append(POPEN(*a, **k)) or processes[-1])
    paths = left(tmp_path / "out", "one", "two", "three")
    begin_to_hash(tmp_path / "out")
    for path in reversed(paths):
        sha256_found(path)
    assert processes[0].wait(30) is not None


def test_where_no_program_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = left(tmp_path / "out", "one")
    monkeypatch.setattr(prehash.sys, "executable", str(tmp_path / "none"))
    begin_to_hash(tmp_path / "out")
    assert sha256_found(path) == sha256("one")
    monkeypatch.setattr(prehash.sys, "executable", "/bin/false")  # says nothing, reads nothing
    begin_to_hash(tmp_path / "out")
    assert sha256_found(path) == sha256("one")


POPEN = subprocess.Popen


def test_a_file_that_went_away(tmp_path: Path) -> None:
    (path,) = left(tmp_path / "out", "one")
    begin_to_hash(tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        sha256_found(path)


@pytest.mark.parametrize("name", ["out", "none/out", "\0", "x" * 300])
def test_where_nothing_was_left_nothing_is_said(tmp_path: Path, name: str) -> None:
    begin_to_hash(tmp_path / name)


def test_files_that_were_never_hashed_are_not_read(tmp_path: Path) -> None:
    paths = left(tmp_path / "out", "one", hashed=False)
    begin_to_hash(tmp_path / "out")
    assert not set(paths) & set(prehash._begun)


def test_what_a_journal_lists_and_is_not_there(tmp_path: Path) -> None:
    (path,) = left(tmp_path / "out", "one")
    path.unlink()
    begin_to_hash(tmp_path / "out")
    with pytest.raises(InputError):
        sha256_found(path)

"""Small files: their text, their modes, and that they reach the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lorafold.errors import CheckpointError, OutputError, VerificationError
from lorafold.files.atomic.durable import copy_file, copy_proven, remove_tree, sync_folder, sync_tree, write_json, write_text


def test_json_is_indented_ordered_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"b": [1, float("inf")], "a": "é"})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": [\n    1,\n    Infinity\n  ],\n  "a": "é"\n}\n'
    assert json.loads(text) == {"b": [1, float("inf")], "a": "é"}


def test_row_51_modes_follow_the_umask_not_the_source(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    (tmp_path / "source").chmod(0o400)
    old = os.umask(0o022)
    try:
        copy_file(tmp_path / "source", tmp_path / "sub" / "copy")
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "sub" / "copy").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o644


def test_row_43_every_file_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def recording(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", recording)
    write_text(tmp_path / "a", "x")
    copy_file(tmp_path / "a", tmp_path / "sub" / "b")
    assert synced == [str(tmp_path / "a"), str(tmp_path / "sub" / "b")]
    synced.clear()
    sync_tree(tmp_path)
    assert set(synced) == {str(tmp_path / name) for name in ("a", "sub", "sub/b")} | {str(tmp_path)}
    assert synced[-1] == str(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_row_44_refusals_are_typed(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "source").write_text("x")
    monkeypatch.setattr(os, "fsync", refused)
    for write in (
        lambda: write_text(tmp_path / "a", "x"),
        lambda: copy_file(tmp_path / "source", tmp_path / "b"),
        lambda: sync_folder(tmp_path),
        lambda: sync_tree(tmp_path),
    ):
        with pytest.raises(OutputError, match=os.strerror(number)):
            write()


def test_nothing_is_overwritten_and_only_regular_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    (tmp_path / "link").symlink_to("a")
    os.mkfifo(tmp_path / "fifo")
    for target in ("a", "link"):
        with pytest.raises(OutputError, match="File exists"):
            write_text(tmp_path / target, "x")
        with pytest.raises(OutputError, match="File exists"):
            copy_file(tmp_path / "a", tmp_path / target)
    with pytest.raises(CheckpointError, match="named pipe"):
        copy_file(tmp_path / "fifo", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "kept"


def test_removing_a_tree_says_what_stands_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f" / "g").mkdir(parents=True)
    assert remove_tree(tmp_path / "f") is None
    assert remove_tree(tmp_path / "f") is None
    (tmp_path / "f").mkdir()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refused)
    assert "Permission denied" in str(remove_tree(tmp_path / "f"))


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EIO, "short"])
def test_a_copy_is_whole_whoever_moves_the_bytes(
    tmp_path: Path, refusal: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "source").write_bytes(data)
    if isinstance(refusal, int):
        monkeypatch.setattr(os, "copy_file_range", _refusing(refusal))
    if refusal == "short":
        real, left = os.copy_file_range, [1_000_003, 5, 0]
        monkeypatch.setattr(os, "copy_file_range", lambda one, two, n, *where: left[0] and real(one, two, left.pop(0), *where))
    assert copy_proven(tmp_path / "source", tmp_path / "copy") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "copy").read_bytes() == data


def test_a_copy_that_is_not_the_same_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    monkeypatch.setattr("lorafold.files.atomic.durable.copy_file", lambda source, target: target.write_bytes(b"abd"))
    with pytest.raises(VerificationError, match="copy is not what"):
        copy_proven(tmp_path / "source", tmp_path / "copy")


def test_row_44_a_source_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"abc")
    blind = os.open(tmp_path / "source", os.O_WRONLY)
    monkeypatch.setattr("lorafold.files.atomic.durable.open_regular", lambda *_, **__: (blind, os.fstat(blind)))
    with pytest.raises(CheckpointError, match=r"source cannot be read: Bad file descriptor"):
        copy_file(tmp_path / "source", tmp_path / "copy")


def _refusing(number: int) -> Any:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused

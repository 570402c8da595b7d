"""A file that appears by one rename, is taken back where what it goes with does not appear, and puts back what was there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from lorafold.errors import OutputError, OutputExistsError
from lorafold.files.atomic import file as stagedfile
from lorafold.files.atomic.file import StagedFile


def filled(file: StagedFile, text: bytes) -> None:
    os.write(file.fd, text)
    os.fsync(file.fd)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_it_appears_and_stays(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with StagedFile(tmp_path / "f") as file:
            filled(file, b"new")
            assert names(tmp_path) == [file.path.name]
            assert file.path.name.startswith(".f.lorafold-")
            file.place()
            assert names(tmp_path) == ["f"]
            file.keep()
    finally:
        os.umask(old)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("old", [None, b"old"])
def test_it_is_taken_back(tmp_path: Path, placed: bool, swaps: bool, old: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`swaps`: whether the system can exchange two files in one step."""
    if not swaps:
        monkeypatch.setattr(stagedfile, "exchange", lambda one, other: False)
    if old is not None:
        (tmp_path / "f").write_bytes(old)
    before = names(tmp_path)
    with StagedFile(tmp_path / "f", replaces=lambda path: True) as file:
        filled(file, b"new")
        if placed:
            file.place()
            assert (tmp_path / "f").read_bytes() == b"new"
    assert names(tmp_path) == before
    assert old is None or (tmp_path / "f").read_bytes() == old


@pytest.mark.parametrize("swaps", [False, True])
def test_what_was_there_goes_when_the_new_one_stays(tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swaps:
        monkeypatch.setattr(stagedfile, "exchange", lambda one, other: False)
    (tmp_path / "f").write_bytes(b"old")
    with StagedFile(tmp_path / "f", replaces=lambda path: path.read_bytes() == b"old") as file:
        filled(file, b"new")
        file.place()
        file.keep()
    assert (names(tmp_path), (tmp_path / "f").read_bytes()) == (["f"], b"new")
    with pytest.raises(OutputExistsError, match="exists"), StagedFile(tmp_path / "f", replaces=lambda path: False):
        pass


def test_where_it_may_not_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, inputs, said in (("folder", [], "not a file"), ("no/f", [], "no folder"), ("f", [tmp_path], "lies in the input")):
        with pytest.raises(OutputError, match=said), StagedFile(tmp_path / path, inputs=inputs):
            pass
    assert names(tmp_path) == ["folder"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with StagedFile(tmp_path / "f") as file:
        filled(file, b"new")
        (tmp_path / "f").write_bytes(b"other")
        with pytest.raises(OutputExistsError):
            file.place()
    assert (names(tmp_path), (tmp_path / "f").read_bytes()) == (["f"], b"other")


def test_files_of_the_dead_are_removed_those_of_the_living_stop_it(tmp_path: Path) -> None:
    leftover = tmp_path / ".f.lorafold-12-0123abcd"
    leftover.write_bytes(b"half")
    for name in (".f.lorafold-12-xyz", ".ff.lorafold-12-0123abcd", ".f.lorafold-old"):
        (tmp_path / name).touch()
    second = StagedFile(tmp_path / "f")
    with StagedFile(tmp_path / "f") as file, pytest.raises(OutputError, match="another merge is writing"), second:
        pass
    assert not leftover.exists()
    assert not file.path.exists()
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize("call", ["open", "rename", "fsync"])
def test_the_system_refuses(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    file = StagedFile(tmp_path / "x" / "f")
    real = getattr(os, call)

    def refused(first: object, *rest: object, **named: object) -> object:
        if call != "open" or ".f.lorafold" in str(first):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(first, *rest, **named)

    def written() -> None:
        if call == "open":
            monkeypatch.setattr(os, call, refused)
        with file:
            monkeypatch.setattr(os, call, refused)
            file.place()

    with pytest.raises(OutputError, match="No space left"):
        written()
    monkeypatch.undo()
    assert names(tmp_path / "x") == []

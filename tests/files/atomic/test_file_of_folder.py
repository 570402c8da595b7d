"""An output that is one file: it appears by one rename, whole, and nothing else is left; or nothing at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorafold.errors import OutputError, OutputExistsError
from lorafold.files.atomic.file_of_folder import StagedFileOfFolder, staging
from lorafold.files.atomic.folder import StagedFolder


def test_one_file_appears_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with StagedFileOfFolder(out) as staged:
        (staged.path / "model.gguf").write_bytes(b"whole")
        (staged.path / "lorafold.json").write_text("{}")
        assert not out.exists()
        staged.commit()
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert out.read_bytes() == b"whole"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with StagedFileOfFolder(tmp_path / "out.gguf") as staged:
            (staged.path / "model.gguf").write_bytes(b"half")
            raise ValueError("half done")

    with pytest.raises(ValueError, match="half done"):
        fail()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("names", [[], ["a.gguf", "b.gguf"]])
def test_what_is_not_one_file_does_not_appear(tmp_path: Path, names: list[str]) -> None:
    def stage() -> None:
        with StagedFileOfFolder(tmp_path / "out.gguf") as staged:
            for name in names:
                (staged.path / name).touch()
            staged.commit()

    with pytest.raises(OutputError, match=f"it would be {len(names)} files"):
        stage()
    assert os.listdir(tmp_path) == []


def test_what_is_there_is_replaced_only_where_that_is_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="exists"), StagedFileOfFolder(out):
        pass
    with StagedFileOfFolder(out, overwrite=True) as staged:
        (staged.path / "model.gguf").write_bytes(b"new")
        assert out.read_bytes() == b"old"
        staged.commit()
    assert out.read_bytes() == b"new"
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(OutputExistsError, match="is not a file"), StagedFileOfFolder(tmp_path / "folder.gguf", overwrite=True):
        pass
    assert sorted(os.listdir(tmp_path)) == ["folder.gguf", "out.gguf"]


def test_something_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def stage() -> None:
        with StagedFileOfFolder(out) as staged:
            (staged.path / "model.gguf").write_bytes(b"new")
            out.write_bytes(b"theirs")
            staged.commit()

    with pytest.raises(OutputExistsError):
        stage()
    assert os.listdir(tmp_path) == ["out.gguf"]
    assert out.read_bytes() == b"theirs"


def test_which_outputs_are_files(tmp_path: Path) -> None:
    assert staging(tmp_path / "a.gguf") is StagedFileOfFolder
    assert staging(tmp_path / "a") is StagedFolder

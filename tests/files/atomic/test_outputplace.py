"""Where an output may and may not be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lorafold.errors import OutputError, OutputExistsError
from lorafold.files.atomic.checks import check_absent, check_apart, check_parent, require_space


@pytest.fixture
def base(tmp_path: Path) -> Path:
    root = tmp_path / "base"
    root.mkdir()
    for name in ("model.safetensors", "config.json"):
        (root / name).write_text("x")
    return root


def test_row_44_too_little_space_names_needed_and_free(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OutputError, match=rf"cannot be written: needed {10**18} bytes, free \d+") as caught:
        require_space(tmp_path / "out", 10**18)
    found = int(str(caught.value).split("free ")[1].split()[0])
    assert abs(found - free) < 0.2 * free  # others write to this disk too


def test_a_parent_that_is_not_there_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"there is no folder .*/a") as caught:
        check_parent(tmp_path / "a" / "out")
    assert caught.value.hint == f"mkdir -p {tmp_path / 'a'}"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        check_parent(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="no name of its own"):
        check_parent(Path("/"))


def test_row_51_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="no permission to write in"):
            check_parent(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)


def test_row_48_what_exists_is_not_replaced(tmp_path: Path, base: Path) -> None:
    check_absent(tmp_path / "new", False)
    (tmp_path / "empty").mkdir()
    check_absent(tmp_path / "empty", False)
    with pytest.raises(OutputExistsError, match="is not empty: it holds 2 entries"):
        check_absent(base, False)
    check_absent(base, True)
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("file", "broken"):
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match="is not a folder"):
                check_absent(tmp_path / name, overwrite)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").touch()
    with pytest.raises(OutputExistsError, match="does not look like a checkpoint"):
        check_absent(tmp_path / "home", True)


def test_a_mount_point_cannot_be_replaced() -> None:
    with pytest.raises(OutputError, match="where a file system is mounted"):
        check_absent(Path("/proc"), True)


def test_row_49_the_output_may_not_be_an_input_in_any_guise(tmp_path: Path, base: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "file").symlink_to(base / "model.safetensors")
    inside, above = base / "merged", tmp_path
    for out, given, says in (
        (base, base, "it is the input"),
        (tmp_path / "link", base, "it is the input"),
        (base, tmp_path / "link", "it is the input"),
        (tmp_path / "base" / ".." / "base", base, "it is the input"),
        (inside, base, "it lies in the input"),
        (tmp_path / "link" / "a" / "b", base, "it lies in the input"),
        (inside, tmp_path / "link", "it lies in the input"),
        (above, base, "lies in it"),
        (above, base / "model.safetensors", "lies in it"),
        (base, base / "model.safetensors", "lies in it"),
        (base, tmp_path / "file", "lies in it"),
    ):
        with pytest.raises(OutputError, match=says):
            check_apart(out, [given])
    check_apart(tmp_path / "out", [base, base / "model.safetensors", tmp_path / "none"])
    check_apart(inside, [base / "model.safetensors"])


def test_row_49_hard_links_and_symbolic_links_to_a_file_of_the_base(tmp_path: Path, base: Path) -> None:
    for make in (os.link, os.symlink):
        out = tmp_path / make.__name__
        out.mkdir()
        make(base / "model.safetensors", out / "weights")
        with pytest.raises(OutputError, match="its weights is a file of the input"):
            check_apart(out, [base])
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to("../old/model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.safetensors").touch()
    with pytest.raises(OutputError, match=r"its model\.safetensors is a file of the input"):
        check_apart(tmp_path / "old", [other])

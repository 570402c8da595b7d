"""Only regular files are opened, and nothing is ever waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lorafold.errors import CheckpointError, InputError
from lorafold.files.regular import open_regular, read_regular


def test_row_22_what_is_not_a_regular_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("loop2", "loop1")
    os.symlink("loop1", "loop2")
    os.symlink("nowhere", "broken")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    for name, says in {
        "fifo": "is a named pipe",
        "folder": "is a folder",
        "loop1": "Too many levels of symbolic links",
        "broken": "symbolic link to nothing",
        "none": "no such file",
        "socket": "is a socket",
        "/dev/null": "is a device",
        "a\0b": "null byte",
        "n" * 300: "File name too long",
        "fifo/x": "Not a directory",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            open_regular(Path(name), error=CheckpointError)


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    fd, status = open_regular(tmp_path / "link")
    os.close(fd)
    assert status.st_size == 3


def test_a_file_replaced_by_a_pipe_between_looking_and_opening_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    status = os.stat(path)
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda _: status)
    with pytest.raises(InputError, match="named pipe"):
        open_regular(path)


def test_reading_stops_at_the_limit_even_where_the_size_lied(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert read_regular(tmp_path / "x", 3) == b"abc"
    with pytest.raises(InputError, match="more than the 2"):
        read_regular(tmp_path / "x", 2)
    proc = Path("/proc/self/status")  # its size is said to be 0
    if proc.exists():
        with pytest.raises(InputError, match="more than the 10 bytes"):
            read_regular(proc, 10)

"""The disk is set to work while a file is written, and nothing depends on it."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from lorafold.files.atomic import durable as writeback
from lorafold.files.atomic.durable import start_writeback
from lorafold.files.safetensors import writer
from lorafold.files.safetensors.writer import ShardWriter


def write_in_pieces(path: Path) -> None:
    with ShardWriter(path, [("w", "U8", (100,))]) as file:
        for start in range(0, 100, 10):
            file.write(file.tensors["w"], start, memoryview(bytes(range(start, start + 10))))


def test_the_disk_begins_after_some_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(writer, "_TO_DISK", 25)
    monkeypatch.setattr(writer, "start_writeback", lambda fd: begun.append(os.fstat(fd).st_size))
    write_in_pieces(tmp_path / "w.safetensors")
    assert len(begun) == 3  # after 30, 60 and 90 bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_the_system_is_asked(tmp_path: Path) -> None:
    assert writeback._sync_file_range() is not None
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(1000))
        file.flush()
        start_writeback(file.fileno())
    start_writeback(10**6)  # no such file: left for fsync to tell


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_a_system_without_it_writes_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(name: object) -> None:
        raise error

    writeback._sync_file_range.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(writer, "_TO_DISK", 25)
    try:
        write_in_pieces(tmp_path / "w.safetensors")
        assert writeback._sync_file_range() is None
    finally:
        writeback._sync_file_range.cache_clear()
    assert (tmp_path / "w.safetensors").read_bytes()[-100:] == bytes(range(100))

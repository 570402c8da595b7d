"""Whether a hidden folder's process is alive: by lock, and by number and start time where there are no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafold.files.atomic.owner import OWNER_NAME, living_owner, lock_folder, write_owner


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)


def test_a_lock_is_life_and_no_lock_is_death(tmp_path: Path) -> None:
    write_owner(tmp_path)
    assert living_owner(tmp_path) is None  # its number is that of this living process all the same
    fd = lock_folder(tmp_path)
    assert living_owner(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)
    (tmp_path / OWNER_NAME).unlink()
    assert living_owner(tmp_path) == "another process"
    os.close(fd)
    assert living_owner(tmp_path) is None
    assert living_owner(tmp_path / "none") is None


def test_another_host_counts_as_alive(tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1}))
    assert living_owner(tmp_path) == "process 1 on elsewhere"


@pytest.mark.usefixtures("no_locks")
def test_without_locks_number_and_start_time_decide(tmp_path: Path) -> None:
    os.close(lock_folder(tmp_path))
    write_owner(tmp_path)
    assert living_owner(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    owner = json.loads((tmp_path / OWNER_NAME).read_text())
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    for change in ({"started": 1}, {"pid": dead.pid}, {"pid": 2**70}):  # the number given anew; gone; no number at all
        (tmp_path / OWNER_NAME).write_text(json.dumps(owner | change))
        assert living_owner(tmp_path) is None, change
    for text in ("", "[]", '{"host": 1}', '{"pid": true, "host": "x"}'):
        (tmp_path / OWNER_NAME).write_text(text)
        assert living_owner(tmp_path) is None

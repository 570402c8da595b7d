"""A merge that is killed or told to stop leaves no output; the next one succeeds and clears what was left.

Each run is a fork of one process that has imported everything and started nothing, stopped before a chosen call to the system.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import plain_adapter, plain_base

DRIVER = '''
import json, os, signal, sys, threading
from pathlib import Path

import rich.console, rich.table, typer.rich_utils
import lorafold
from lorafold.cli import commands
from lorafold.cli.main import main

folder, stop, chosen = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
CALLS = ["open", "mkdir", "pwrite", "copy_file_range", "posix_fallocate", "fsync", "unlink", "rename"]
arguments = ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(folder / "out")]


def run(until=None):
    """Merge in a child, stopped before call number `until`: its status, and the calls that it made, in order."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        lock, count = threading.Lock(), 0

        def counted(name, call):
            def wrapper(*args, **kwargs):
                nonlocal count
                with lock:
                    count += 1
                    mine = count
                    os.write(writing, (name + " ").encode())
                if mine == until:
                    os.kill(os.getpid(), getattr(signal, stop))
                return call(*args, **kwargs)
            return wrapper

        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
        try:
            main(arguments)
        except SystemExit as error:
            os._exit(error.code)
    os.close(writing)
    with open(reading) as calls:
        made = calls.read().split()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), made


def beside():
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in ("base", "adapter"))


def clear():
    import shutil
    shutil.rmtree(folder / "out")


status, calls = run()
assert (status, beside()) == (0, ["out"]), (status, beside())
clear()
last = len(calls) - calls[::-1].index("rename")  # the call that puts the output in its place
print(json.dumps({"calls": calls[:last]}))
for until in [1 + (last - 1) * i // (chosen - 1) for i in range(chosen)]:
    status, _ = run(until)
    left = beside()
    again, _ = run()
    print(json.dumps({"until": until, "call": calls[until - 1], "status": status, "left": left, "again": again, "after": beside()}))
    clear()
'''


def stopped(folder: Path, signal: str, count: int) -> list[dict[str, Any]]:
    plain_base(folder / "base")
    plain_adapter(folder / "adapter")
    (folder / "base" / "tokenizer.json").write_text("{}")
    command = [sys.executable, "-c", DRIVER, folder, signal, json.dumps(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, *runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert set(first["calls"]) >= {"open", "mkdir", "pwrite", "fsync", "rename"}
    return runs


def test_row_42_killed_at_twelve_instants(tmp_path: Path) -> None:
    runs = stopped(tmp_path, "SIGKILL", 12)
    assert len(runs) == 12
    for run in runs:
        assert run["status"] == -9
        assert "out" not in run["left"], run
        assert len(run["left"]) <= 1, run
        assert (run["again"], run["after"]) == (0, ["out"]), run
    assert sum(bool(run["left"]) for run in runs) >= 10  # most were killed at work, not before or after


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_row_45_told_to_stop(tmp_path: Path, signal: str, code: int) -> None:
    for run in stopped(tmp_path, signal, 5):
        if run["left"] == ["out"]:  # done before it heard of it
            assert run["status"] == 0
        else:  # nothing is left, or files that were finished
            assert run["status"] == code
            assert len(run["left"]) <= 1, run
            assert all(name.startswith(".out.lorafold-") for name in run["left"]), run
        assert (run["again"], run["after"]) == (0, ["out"]) or run["left"] == ["out"], run

"""Faults injected into real calls to the system, and their order in a real trace, where processes may be traced."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import plain_adapter, plain_base

SCRIPT = Path(__file__).parent / "syscalls.py"


def _why_not() -> str:
    """Why processes cannot be traced here; nothing where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-f", "-e", "inject=fsync:error=EIO", "true"], capture_output=True)
    return "" if done.returncode == 0 else "processes may not be traced here"


WHY_NOT = _why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.mark.slow
def test_row_42_and_44_a_sample_of_all_calls() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--every", "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d faults injected, 0 not survived", done.stdout)


def test_row_43_the_undo_file_is_in_place_before_the_output(tmp_path: Path) -> None:
    base, adapter, log = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter"), tmp_path / "log"
    trace = ["strace", "-f", "-y", "-o", log, "-e", "trace=fsync,?rename,?renameat,?renameat2"]
    merge = [sys.executable, "-m", "lorafold", "merge", base, adapter, "-o", tmp_path / "out", "--undo", tmp_path / "undo"]
    done = subprocess.run([*trace, *merge], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = {
        r"fsync\(\d+<.*/\.undo\.lorafold-[^/]*>": "file",
        r"rename.*\.undo\.lorafold-": "undo",
        r"rename.*\.out\.lorafold-[^/]*\", ": "out",
        rf"fsync\(\d+<{re.escape(str(tmp_path))}>": "folder",
    }
    lines = [line for line in log.read_text().splitlines() if ".lorafold-journal" not in line]
    order = [kind for line in lines for pattern, kind in kinds.items() if re.search(pattern, line)]
    assert order == ["file", "undo", "folder", "out", "folder"]


def test_row_43_files_then_the_rename_then_the_folder(tmp_path: Path) -> None:
    base, adapter, out, log = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter"), tmp_path / "out", tmp_path / "log"
    trace = ["strace", "-f", "-y", "-o", log, "-e", "trace=fsync,?rename,?renameat,?renameat2"]
    merge = [sys.executable, "-m", "lorafold", "merge", base, adapter, "-o", out]
    done = subprocess.run([*trace, *merge], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in log.read_text().splitlines() if str(tmp_path) in line and ".lorafold-journal" not in line]
    (at,) = [i for i, line in enumerate(lines) if "rename" in line]
    synced = [Path(found[1]) for line in lines[:at] if (found := re.search(r"fsync\(\d+<([^>]*)>", line))]
    assert {path.name for path in synced} >= {path.name for path in out.iterdir()}
    assert synced[-1].name.startswith(".out.lorafold-")  # the folder itself, when its last entry had changed
    (after,) = [line for line in lines[at + 1 :] if "fsync" in line]
    assert f"<{tmp_path}>" in after

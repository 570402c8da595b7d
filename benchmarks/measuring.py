"""Wall time and peak memory of a command, and the machine that they were measured on.

The process that measures must stay small: Linux counts the memory of the process that starts a command towards the command's
peak. So nothing here, and nothing in a benchmark that uses this, imports torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One run of a command: `seconds` of wall time, `peak` resident bytes, and what it `said`."""

    seconds: float
    peak: int
    said: str = ""


def measured(command: Sequence[str | Path], *, then_sync: Path | None = None) -> Measurement:
    """Run `command`; its time includes bringing the files of `then_sync` to the disk. Raises where the command fails."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(map(str, command))}\n{said}")
    if then_sync is not None:
        sync(then_sync)
    return Measurement(time.perf_counter() - start, usage.ru_maxrss * 1024, said)


def sync(directory: Path) -> None:
    """Bring every file of `directory`, and the directory itself, to the disk."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def size_of(directory: Path) -> int:
    """Bytes of all files in `directory`."""
    return sum(path.stat().st_size for path in directory.iterdir())


def read_into_cache(directory: Path) -> None:
    """Read every file of `directory` once, so that it lies in the page cache."""
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def drop_from_cache(directory: Path) -> None:
    """Ask the kernel to forget the cached pages of every file of `directory`."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, cores, and versions."""
    packages = ("lorafold", "torch", "safetensors", "transformers", "peft")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def load_of_others() -> float:
    """Processes that were running or waiting to run in the last minute, on average."""
    return os.getloadavg()[0]


def python(*words: str | Path) -> list[str | Path]:
    """A command for the interpreter that runs this."""
    return [sys.executable, *words]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()

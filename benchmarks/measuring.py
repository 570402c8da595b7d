"""Wall time and peak memory of a command, and the machine that they were measured on.

The process that measures must stay small: Linux counts the memory of the process that starts a command towards the command's
peak. So nothing here, and nothing in a benchmark that uses this, imports torch.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """One run of a command: `seconds` of wall time, `peak` resident bytes, and what it `said`.

    Of a command that calls `wait_for_the_start`, `seconds` begin there; `import_seconds` and `import_peak` are of what was before.
    """

    seconds: float
    peak: int
    said: str = ""
    import_seconds: float = 0.0
    import_peak: int = 0


_IMPORTED = "imported"

SECONDS = "seconds"
"""What a command prints before the seconds that it measured itself, where its end, or what is before, is no part of the work."""


def wait_for_the_start() -> None:
    """Called by a command that is measured, when all that it imports is imported: wait until `measured` lets it go on."""
    print(_IMPORTED, flush=True)
    sys.stdin.readline()


class TooLongError(Exception):
    """A command was stopped, since it took longer than it may."""


def measured(
    command: Sequence[str | Path],
    *,
    then_sync: Path | None = None,
    before: Callable[[], None] | None = None,
    limit: float | None = None,
) -> Measurement:
    """Run `command`; its time includes bringing the files of `then_sync` to the disk. Raises where the command fails.

    - `before`: called right before the clock starts; where the command is a Python program, that is when it has imported what it
      needs and calls `wait_for_the_start`
    - `limit`: seconds from when the clock starts, after which the command is stopped, and `TooLongError` raised
    """
    waits = before is not None and str(command[0]) == sys.executable
    import_seconds, import_peak = 0.0, 0
    start = time.perf_counter()
    if before is not None and not waits:
        before()
        start = time.perf_counter()
    pipe = subprocess.PIPE
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # it slows imports down
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), environ.get("PYTHONPATH"))))
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environ)
    assert process.stdin is not None
    assert process.stdout is not None
    if before is not None and waits:
        said = ""
        while not said.endswith(f"{_IMPORTED}\n") and (line := process.stdout.readline()):
            said += line
        if not said.endswith(f"{_IMPORTED}\n"):
            process.communicate()
            raise RuntimeError(f"exit code {process.returncode}: {' '.join(words)}\n{said}")
        import_seconds, import_peak = time.perf_counter() - start, _peak(process.pid)
        before()
        start = time.perf_counter()
        process.stdin.write("\n")
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(limit, stop) if limit is not None else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    process.stdin.close()
    with process.stdout:
        said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if timer is not None:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    if stopped.is_set():
        raise TooLongError(f"more than {limit:g} s: {' '.join(words)}")
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(map(str, command))}\n{said}")
    if then_sync is not None:
        sync(then_sync)
    seconds = time.perf_counter() - start
    own = [line.removeprefix(SECONDS) for line in said.splitlines() if line.startswith(f"{SECONDS} ")]
    return Measurement(float(own[-1]) if own else seconds, usage.ru_maxrss * 1024, said, import_seconds, import_peak)


def _peak(pid: int) -> int:
    """Bytes that the process had resident at most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def sync(directory: Path) -> None:
    """Bring every file of `directory`, and the directory itself, to the disk; or the one file that it is."""
    for path in [*(() if directory.is_file() else directory.iterdir()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def size_of(directory: Path) -> int:
    """Bytes of all files in `directory`."""
    return sum(path.stat().st_size for path in directory.iterdir())


def read_into_cache(directory: Path) -> None:
    """Read every file of `directory`, or the one file that it is, once, so that it lies in the page cache."""
    for path in [directory] if directory.is_file() else directory.iterdir():
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

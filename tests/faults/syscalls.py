"""A small merge, killed or refused at each of its calls to the system in turn, by strace; after each, the same command again.

Whatever was injected, the output must be absent or verify, and be there with its undo file; the error must be one of lorafold's,
and the next run must finish with the same bits of both. Each run is a fork of this process, which has imported everything and
started nothing.

    python tests/faults/syscalls.py            # all calls, some minutes
    python tests/faults/syscalls.py --every 9  # every ninth
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import rich.console
import rich.table  # noqa: F401

from lorafold.api import verifying
from lorafold.cli.main import main
from lorafold.engine import produce as passing

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import plain_adapter, plain_base

CALLS = {
    "read": "?pread64,?preadv",
    "write": "write,?pwrite64,?pwritev,?copy_file_range",
    "fsync": "fsync,?fdatasync",
    "rename": "?rename,?renameat,?renameat2",
    "close": "close",
    "ftruncate": "ftruncate,?fallocate",
}
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
WAYS = {"block by block": 1 << 40, "from file to file": 0}
"""How a block goes, and the bytes from which one goes from file to file."""
_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True)
class Injected:
    """One fault: what was injected, at which call of which kind; how the run ended and what it said."""

    call: str
    fault: str
    when: int
    status: int
    said: str
    hit: bool


def can_trace() -> str | None:
    """Why strace cannot be used here; None where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-f", "-e", "inject=fsync:error=EIO", "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"strace cannot trace: {done.stderr.strip().splitlines()[-1]}"


def run(folder: Path, *, call: str | None = None, fault: str = "", when: int = 0) -> Injected:
    """Merge in a child; with `call`, under strace, which injects `fault` at the child's call number `when`, of each thread."""
    log, said = folder / "strace", folder / "said"
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1))
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        if call is not None:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            base, adapter, out, undo = (str(folder / name) for name in ("base", "adapter", "out", "undo"))
            main(["merge", base, adapter, "-o", out, "--undo", undo])
        except SystemExit as error:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else 1)
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
            os._exit(99)
    tracer = None
    if call is not None:
        os.waitpid(pid, os.WUNTRACED)
        inject = ["-e", f"trace={CALLS[call]}", "-e", f"inject={CALLS[call]}:{fault}:when={when}"]
        tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), "-o", log, *inject], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        tracer.stderr.readline()  # attached
        os.kill(pid, signal.SIGCONT)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if tracer is not None:
        tracer.communicate()
    hit = status == -signal.SIGKILL or (log.exists() and "(INJECTED)" in log.read_text())
    return Injected(call or "", fault, when, status, said.read_text(), hit)


def content(folder: Path) -> dict[str, str]:
    """sha256 of what the output holds, by name, and of the undo file where it is there."""
    paths = [*(folder / "out").iterdir(), *(path for path in [folder / "undo"] if path.exists())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def clear(folder: Path) -> None:
    """Remove the output and its undo file."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    (folder / "undo").unlink(missing_ok=True)


def verified(folder: Path) -> bool:
    """Whether the output proves to be base and adapter."""
    return not verifying.verify(folder / "out", folder / "base", [folder / "adapter"]).failures


def injections(folder: Path, every: int) -> Iterator[tuple[Injected, list[str]]]:
    """Each fault with what is wrong after it, which should be nothing; blocks go one way, and then the other."""
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(["plan", str(folder / "base"), str(folder / "adapter")])  # imports what is imported late, and starts no thread
    clean = run(folder)
    assert clean.status == 0, clean.said
    wanted = content(folder)
    for least, call in product(WAYS.values(), CALLS):
        passing.LEAST = least
        for fault in FAULTS:
            when = 1
            while True:
                clear(folder)
                found = run(folder, call=call, fault=fault, when=when)
                if not found.hit:
                    break
                yield found, _wrong(folder, found, wanted)
                when += every


def _wrong(folder: Path, found: Injected, wanted: dict[str, str]) -> list[str]:
    wrong = []
    if found.status != -signal.SIGKILL and "Traceback" in found.said:
        wrong.append(f"no error of lorafold's: {found.said[-300:]}")
    there = (folder / "out").exists()
    if there and content(folder) != wanted:
        wrong.append(f"the output is not whole: {sorted(content(folder))}")
    if there and not verified_in_child(folder):
        wrong.append("the output does not verify")
    if found.status == 0 and not there:
        wrong.append("success is claimed, and nothing is there")
    if found.status > 0 and not there and (folder / "undo").exists():
        wrong.append("there is an undo file of an output that is not there")
    shutil.rmtree(folder / "out", ignore_errors=True)
    if there:
        (folder / "undo").unlink(missing_ok=True)
    again = run(folder)
    if again.status != 0 or content(folder) != wanted:
        wrong.append(f"the next run ends with {again.status}: {again.said[-300:]}")
    left = [name for name in os.listdir(folder) if name.startswith((".out", ".undo"))]
    if left:
        wrong.append(f"left: {left}")
    return wrong


def verified_in_child(folder: Path) -> bool:
    """`verified`, in a fork, so that this process starts no threads."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if verified(folder) else 1)
    return os.waitpid(pid, 0)[1] == 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="inject at every n-th call")
    parser.add_argument("--where-possible", action="store_true", help="where processes may not be traced, say so and succeed")
    chosen = parser.parse_args()
    every, reason = chosen.every, can_trace()
    if reason is not None:
        print(reason)
        return 0 if chosen.where_possible else 2
    counts: dict[tuple[str, str], int] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain_base(folder / "base")
        plain_adapter(folder / "adapter")
        for found, wrong in injections(folder, every):
            counts[found.call, found.fault] = counts.get((found.call, found.fault), 0) + 1
            failed += bool(wrong)
            for each in wrong:
                print(f"{found.call} {found.fault} when={found.when}: {each}")
    for (call, fault), count in counts.items():
        print(f"{call:<10} {fault:<16} {count:4} injected")
    print(f"{sum(counts.values())} faults injected, {failed} not survived")
    return 1 if failed or not counts else 0


if __name__ == "__main__":
    sys.exit(_main())

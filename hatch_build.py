"""Compiles the kernel's C file while lorafold is built, where there is a compiler: once for each instruction set.

Without a compiler, or where it fails, the package is built without, and the kernel does its work with torch alone, with the same
bits. LORAFOLD_NATIVE=0 in the environment leaves it out; CC names the compiler, `cc` by default.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNEL = Path("src/lorafold/kernel/cpu")
FLAGS = ["-O3", "-std=c11", "-ffp-contract=fast", "-fPIC", "-shared", "-w"]
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
"""What torch asks of a processor before it calls it AVX512 or AVX2."""


class CompiledKernel(BuildHookInterface[Any]):
    """Adds libmerge_<instruction set>.so files to a wheel; in an editable installation they lie beside their source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = Path(self.root, KERNEL, "merge.c")
        editable = version == "editable"
        self._directory = None if editable else tempfile.mkdtemp(prefix="lorafold-")
        target = source.parent if self._directory is None else Path(self._directory)
        for old in target.glob("libmerge_*.so"):
            old.unlink()
        built = [] if os.environ.get("LORAFOLD_NATIVE") == "0" else compiled(source, target, self.app.display_info)
        if built and not editable:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["force_include"] |= {str(path): f"lorafold/kernel/cpu/{path.name}" for path in built}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def compiled(source: Path, target: Path, say: Callable[[str], None]) -> list[Path]:
    """The files made in `target`; `say` is told what could not be made."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    sets = {**(X86 if platform.machine().lower() in ("x86_64", "amd64") else {}), "plain": []}
    running = {}
    for name, flags in sets.items():
        path = target / f"libmerge_{name}.so"
        command = [*compiler, *FLAGS, *flags, str(source), "-o", str(path), "-lm"]
        try:
            running[path] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            say(f"no compiled kernel {path.name}: {error}")
    built = []
    for path, process in running.items():
        said, _ = process.communicate()
        if process.returncode == 0 and path.exists():
            built.append(path)
        else:
            say(f"no compiled kernel {path.name}: {shlex.join(process.args)} failed\n{said.decode(errors='replace')}")
            path.unlink(missing_ok=True)
    return built

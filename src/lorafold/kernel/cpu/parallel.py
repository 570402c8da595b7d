"""Compiled jobs done by several threads at once: torch's own, where its OpenMP can be asked, and else some of ours.

torch's threads stay awake for some milliseconds after an operation, waiting for the next. While they do, threads of ours would
have to share the processors with them; and to wake a thread takes as long as a small merge.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .loader import Build


class _Queue(ctypes.Structure):
    """`struct queue` of merge.c."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("jobs", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("next", ctypes.c_int64),
    ]


def run_parallel(build: Build, function: Callable[[Any], None], jobs: ctypes.Array[Any]) -> None:
    """Call `function` of `build` with each of the `jobs`, in as many threads as torch would use here."""
    threads = min(torch.get_num_threads(), len(jobs))
    if threads == 1:
        for job in jobs:
            function(ctypes.byref(job))
    elif (parallel := _parallel()) is not None:
        address = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
        queue = _Queue(address, ctypes.addressof(jobs), ctypes.sizeof(jobs) // len(jobs), len(jobs), 0)
        build.library.lorafold_parallel(ctypes.byref(queue), parallel, ctypes.c_uint(threads))
    else:
        list(_pool(threads).map(lambda job: function(ctypes.byref(job)), jobs))


@cache
def _parallel() -> Any:
    """GOMP_parallel of the OpenMP that torch's operations use; GCC's and LLVM's libraries have it. None where it is not found."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return library.GOMP_parallel
    except (OSError, AttributeError):
        return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay."""
    return ThreadPoolExecutor(threads, "lorafold-kernel")


def _forked() -> None:
    """A fork takes no threads along, and OpenMP does not know: the child asks it no more."""
    global _parallel  # noqa: PLW0603
    _pool.cache_clear()
    _parallel = cache(lambda: None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

"""What must hold around the arithmetic: no autograd, no autocast, and matmuls at the full precision of their dtype.

TF32 and its like are global switches of torch that a training script may have turned on. They are turned off while any merge is
under way and put back after the last, so that a merge has the same bits whatever the program around it did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within it, a float32 matmul on `device` is done in float32. Several threads may be within at once."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        _enter()
        try:
            yield
        finally:
            _leave()


_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None] | None = None


def _enter() -> None:
    global _inside, _restore  # noqa: PLW0603 - the switches are global, so is what they were
    with _lock:
        _inside += 1
        if _inside == 1:
            _restore = _switch_off()


def _leave() -> None:
    global _inside, _restore  # noqa: PLW0603
    with _lock:
        _inside -= 1
        if _inside == 0 and _restore is not None:
            _restore()
            _restore = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch uses one thread for what this thread does on the CPU.

    torch's threads stay awake for a while after an operation, waiting for the next, and take the processors from ours: for what is
    done before ours begin, and is too small to be worth it, they are not woken. torch keeps the number for each thread apart.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def _switch_off() -> Callable[[], None]:
    """Full precision from here on; what puts the switches back."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    switches: list[Any] = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    if switches:  # torch 2.9 and newer: one a backend
        saved = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"

        def restore() -> None:
            for switch, value in zip(switches, saved, strict=True):
                switch.fp32_precision = value

        return restore
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)

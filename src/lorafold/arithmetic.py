"""What must hold around the arithmetic, whatever the program around it has set.

A training script may have turned on TF32, autocast, gradients, a default device or dtype, or the flushing of subnormal numbers to
zero. None of it may change a bit of a merge, and a merge may leave none of it changed. Default device and dtype are dealt with
where tensors are made: each names its own. The rest is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, what this thread computes on the CPU is what it says: no autocast, subnormal numbers, one of torch's threads."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), subnormal_numbers(), one_thread():
        yield


@contextmanager
def subnormal_numbers(*, workers: bool = False) -> Iterator[None]:
    """Within it, this thread does not take subnormal numbers for zeros, as `torch.set_flush_denormal(True)` would have it.

    That is a mode of the processor, of each thread apart; a new thread begins with that of the thread which began it.

    - `workers`: whether torch's other threads may do a part of the work. They cannot be told from here; where they, or this one,
      take subnormal numbers for zeros, torch does without them meanwhile
    """
    flushes = _flushes()
    if flushes:
        torch.set_flush_denormal(False)
    try:
        with ExitStack() as stack:
            if workers and torch.get_num_threads() > 1 and (flushes or _workers_flush()):
                stack.enter_context(one_thread())
            yield
    finally:
        if flushes:
            torch.set_flush_denormal(True)


_SUBNORMAL = [2.0**-1073]  # in a list, so that Python multiplies when it is asked to
_SPREAD = 1 << 15  # elements that torch does not split among its threads


def _flushes() -> bool:
    """Whether this thread takes subnormal numbers for zeros."""
    return _SUBNORMAL[0] * 0.5 == 0.0


def _workers_flush() -> bool:
    """Whether any of torch's threads does."""
    subnormal = torch.full((torch.get_num_threads() * _SPREAD,), 2.0**-140, dtype=torch.float32, device="cpu")
    return not bool(subnormal.mul_(0.5).all())


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

"""What must hold around the arithmetic: no autograd, no autocast, and matmuls at the full precision of their dtype.

TF32 and its like are global switches of torch that a training script may have turned on. They are turned off here and put back
after, so that a merge has the same bits whatever the program around it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _switches() -> list[Any]:
    """The places where torch (2.9 and newer) keeps the precision of float32 matmuls, one a backend."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if backend is not None and hasattr(backend, "fp32_precision")]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within it, a float32 matmul on `device` is done in float32."""
    switches = _switches()
    saved = [switch.fp32_precision for switch in switches]
    legacy = torch.get_float32_matmul_precision() if not switches else "highest"
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            if legacy != "highest":
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for switch, value in zip(switches, saved, strict=True):
                switch.fp32_precision = value
            if legacy != "highest":
                torch.set_float32_matmul_precision(legacy)

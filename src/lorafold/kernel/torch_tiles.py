"""The buffers of tiles, kept from one merge to the next: fresh ones would cost more in page faults than the arithmetic."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_WIDE = 5
"""Wide buffers that a tile needs at once: the sum, its margin, the base, ΔW and the lower end; those never taken cost nothing."""


class Scratch:
    """Room for tiles of up to `rows` × `columns` elements: five in the wide dtype, two in the target's."""

    def __init__(self, rows: int, columns: int, wide: torch.dtype, target: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self.columns = columns
        self._wide = [torch.empty(0, dtype=wide, device=device)] * _WIDE
        self._narrow = [torch.empty(0, dtype=target, device=device)] * 2

    def take(self, which: int, like: Tensor) -> Tensor:
        """Wide buffer number `which`, cut to the rows of `like`."""
        return self._cut(self._wide, which, like)

    def merged(self, like: Tensor) -> Tensor:
        """The buffer in the target's dtype that a merged tile is built in."""
        return self._cut(self._narrow, 0, like)

    def narrow(self, like: Tensor) -> Tensor:
        """The other buffer in the target's dtype."""
        return self._cut(self._narrow, 1, like)

    def _cut(self, buffers: list[Tensor], which: int, like: Tensor) -> Tensor:
        numel = like.shape[0] * self.columns
        if buffers[which].numel() < numel:  # allocated when first needed
            with torch.inference_mode(False):  # or the next merge, outside of that mode, could not write into it
                buffers[which] = buffers[which].new_empty(self.rows * self.columns)
        return buffers[which][:numel].view(like.shape[0], self.columns)

    def reshaped(self, rows: int, columns: int) -> Scratch:
        """The same buffers for tiles of another shape; they grow where they must."""
        self.rows, self.columns = rows, columns
        return self


class _Kept(threading.local):
    """Each thread's last scratch."""

    key: tuple[torch.dtype, torch.dtype] | None = None
    scratch: Scratch | None = None


_kept = _Kept()


def scratch_for(rows: int, columns: int, wide: torch.dtype, target: torch.dtype, device: torch.device) -> Scratch:
    """Buffers for tiles of up to `rows` × `columns`; on the CPU this thread's last ones, if of the same dtypes."""
    if device.type != "cpu":
        return Scratch(rows, columns, wide, target, device)  # the device's own allocator keeps what is freed
    if _kept.scratch is None or _kept.key != (wide, target):
        _kept.key, _kept.scratch = (wide, target), Scratch(rows, columns, wide, target, device)
    return _kept.scratch.reshaped(rows, columns)

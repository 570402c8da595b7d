"""The buffers of one merge, allocated once: fresh ones for each tile would cost more in page faults than the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 5
"""Wide buffers that a tile needs at once: the sum, its margin, the base, ΔW and the lower end; those never taken cost nothing."""


class Scratch:
    """Room for tiles of up to `rows` × `columns` elements: five in the wide dtype, two in the target's."""

    def __init__(self, rows: int, columns: int, wide: torch.dtype, target: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._wide = [torch.empty(0, dtype=wide, device=device)] * _WIDE
        self._narrow = [torch.empty(0, dtype=target, device=device)] * 2
        self._shape = (rows, columns)

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
        if buffers[which].dim() != 2:  # allocated when first needed
            buffers[which] = buffers[which].new_empty(self._shape)
        return buffers[which][: like.shape[0]]

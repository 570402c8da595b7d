"""The face that every undo shows to a layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Undo(Protocol):
    """What was kept when a block of a weight was merged."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are kept."""

    def restore(self, merged: Tensor) -> Tensor:
        """The base, of the shape, dtype and device of `merged`, which is the block as merging left it and is not written to.

        The tensor belongs to the undo: copy from it, do not change it.

        Raises `LayerError` where the base cannot be proven to be the one that was merged.
        """

    def to(self, device: torch.device) -> Undo:
        """The same undo for a block that now lives on `device`, with the same bits."""

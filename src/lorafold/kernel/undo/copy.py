"""Undo by keeping the base tensor: nothing to compute, as much memory again as the weight takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merge import Precision, merge_weight
from ..update import LowRankUpdate


@dataclass(frozen=True, eq=False)
class CopyUndo:
    """The base as it was.

    - `base`: (rows, in), a tensor of its own
    - `follows`: whether it moves with the layer, or stays on the device where it is
    """

    base: Tensor
    follows: bool = True

    @property
    def nbytes(self) -> int:
        return self.base.numel() * self.base.element_size()

    def restore(self, merged: Tensor) -> Tensor:
        return self.base.to(merged.device)

    def to(self, device: torch.device) -> CopyUndo:
        return CopyUndo(self.base.to(device)) if self.follows else self


def merge_keeping_copy(block: Tensor, updates: Sequence[LowRankUpdate], *, precision: Precision, on_cpu: bool = False) -> CopyUndo:
    """Merge `updates` into `block` in place; returns what restores it. Where merging fails, `block` is as it was."""
    undo = CopyUndo(block.to("cpu", copy=True) if on_cpu else block.clone(), follows=not on_cpu)
    try:
        merge_weight(block, updates, out=block, precision=precision)
    except BaseException:
        block.copy_(undo.base)
        raise
    return undo

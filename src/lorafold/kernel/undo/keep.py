"""What is kept of a base weight when an update is merged into it in place, and how it is restored: a copy, or a correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from ...errors import LayerError
from ..merge import Precision, merge_weight
from ..update import LowRankUpdate
from .compact import merge_keeping_correction


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

    def check(self, merged: Tensor) -> None:
        """Raises what `restore` would raise."""

    def put_back(self, merged: Tensor) -> None:
        """Write the base over `merged`, in place. Raises as `restore` does, and `merged` is then as it was."""

    def to(self, device: torch.device) -> Undo:
        """The same undo for a block that now lives on `device`, with the same bits."""


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

    def check(self, merged: Tensor) -> None:
        pass

    def put_back(self, merged: Tensor) -> None:
        merged.copy_(self.base)

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


UndoKind = Literal["copy", "copy-cpu", "compact"]


def check_undo_kind(kind: str) -> None:
    """Raises `LayerError` unless `kind` is a way to undo a merge."""
    if kind not in get_args(UndoKind):
        raise LayerError(f"undo must be one of {', '.join(map(repr, get_args(UndoKind)))}, not {kind!r}")


def merge_keeping(block: Tensor, updates: Sequence[LowRankUpdate], *, undo: UndoKind, precision: Precision = "exact") -> Undo:
    """Merge `updates` into `block` in place, and return what restores it bit for bit.

    - `block`: (rows, in), any floating dtype, possibly a view; where merging fails, it is as it was
    - `undo`: ``"copy"`` keeps the base beside the weight, ``"copy-cpu"`` keeps it in main memory, ``"compact"`` keeps a
      correction of about two bits an element, the factors, and a checksum

    >>> W = torch.tensor([[1.0, 2.0]])
    >>> kept = merge_keeping(W, [LowRankUpdate(torch.ones(1, 2), torch.ones(1, 1), scaling=0.5)], undo="copy")
    >>> W, kept.restore(W)
    (tensor([[1.5000, 2.5000]]), tensor([[1., 2.]]))
    """
    check_undo_kind(undo)
    with torch.no_grad():
        if undo == "compact":
            return merge_keeping_correction(block, updates, precision=precision)
        return merge_keeping_copy(block, updates, precision=precision, on_cpu=undo == "copy-cpu")

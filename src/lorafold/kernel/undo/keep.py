"""Merging a block of a weight in place, with a choice of what is kept to take it out again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ...errors import LayerError
from ..merge import Precision
from ..update import LowRankUpdate
from .compact import merge_keeping_correction
from .copy import merge_keeping_copy
from .undo import Undo

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

"""`Embedding`: a table with a low-rank update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ...errors import LayerError
from ...kernel.merge import Precision
from ...kernel.undo.keep import UndoKind
from ...kernel.update import LowRankUpdate
from .adapted import RowBlock
from .lora_layer import Branch, add_branch, wide_product
from .mergeable import Mergeable


class Embedding(Mergeable, nn.Embedding):
    """`torch.nn.Embedding` with a low-rank update ΔW = (lora_B @ lora_A)ᵀ · scaling.

    - `weight`: (num_embeddings, embedding_dim), frozen where r > 0
    - `lora_A`: (r, num_embeddings), zeros at first; `lora_B`: (embedding_dim, r), normal at first

    Merging changes the row of `padding_idx` as any other, and the output for it with it, merged and unmerged alike.

    Raises `LayerError` for `max_norm` with r > 0: looking a row up would rescale it, merged and unmerged in different ways.

    >>> import torch
    >>> layer = Embedding(10, 4, r=2)
    >>> layer(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        undo: UndoKind = "copy",
        precision: Precision = "exact",
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        Mergeable.__init__(self, r, lora_alpha, 0.0, merge_weights, undo=undo, precision=precision)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.Embedding.reset_parameters(self)
        self.reset_factors()

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if self.max_norm is not None:
            raise LayerError(
                "an Embedding with max_norm cannot have a low-rank update: looking a row up rescales it, and a merged row "
                "otherwise than an unmerged one",
                hint="leave out max_norm, or set r=0",
            )
        return (r, self.num_embeddings), (self.embedding_dim, r)

    def init_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.zeros_(lora_A)
        nn.init.normal_(lora_B)

    def row_blocks(self, branches: Sequence[Branch]) -> list[RowBlock]:
        return [RowBlock(0, self.num_embeddings, [LowRankUpdate(b.lora_A, b.lora_B, b.scaling).T for b in branches])]

    def forward(self, x: Tensor) -> Tensor:
        """(…, embedding_dim) from `x`, (…) integers."""
        return self.add_branches(nn.Embedding.forward(self, x), x, self.unmerged_branches())

    def add_branches(self, y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
        for branch in branches:
            h = F.embedding(
                x, branch.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
            )  # (…, r)
            y = add_branch(y, h, branch.lora_B, branch.scaling)
        return y

    def delta(self, branch: Branch) -> Tensor:
        return wide_product(branch).T

"""`Linear`: y = Wx + b + scaling · lora_B lora_A x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's users know
from torch import Tensor, nn

from ...kernel.merge import Precision
from ...kernel.undo.keep import UndoKind
from ...kernel.update import LowRankUpdate
from .adapted import RowBlock
from .branch import Branch, add_branch, low_rank, wide_product
from .mergeable import Mergeable


class Linear(Mergeable, nn.Linear):
    """`torch.nn.Linear` with a low-rank update.

    - `weight`: (out_features, in_features), or (in_features, out_features) with `fan_in_fan_out`; frozen where r > 0
    - `lora_A`: (r, in_features), `lora_B`: (out_features, r); there only where r > 0
    - `undo`, `precision`: how merging is undone and how it rounds, as for `lorafold.kernel.undo.keep.merge_keeping`

    `eval()` merges and `train()` unmerges unless `merge_weights` is false.

    >>> layer = Linear(4, 3, r=2, lora_alpha=4)
    >>> base = layer.weight.clone()
    >>> layer.eval().merged, layer.train().merged, torch.equal(layer.weight, base)
    (True, False, True)
    """

    fan_in_fan_out = False  # while nn.Linear.__init__ draws the first weights

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        undo: UndoKind = "copy",
        precision: Precision = "exact",
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        Mergeable.__init__(self, r, lora_alpha, lora_dropout, merge_weights, undo=undo, precision=precision)
        self.reset_parameters()
        if fan_in_fan_out:
            self.fan_in_fan_out = True
            self.weight.data = self.weight.data.T.contiguous()

    def reset_parameters(self) -> None:
        if self.fan_in_fan_out:
            fresh = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device, self.weight.dtype)
            with torch.no_grad():
                self.weight.copy_(fresh.weight.T)
                if self.bias is not None:
                    self.bias.copy_(fresh.bias)
        else:
            nn.Linear.reset_parameters(self)
        self.reset_factors()

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return (r, self.in_features), (self.out_features, r)

    def init_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def row_blocks(self, branches: Sequence[Branch]) -> list[RowBlock]:
        updates = [LowRankUpdate(b.lora_A, b.lora_B, b.scaling) for b in branches]
        if self.fan_in_fan_out:
            updates = [update.T for update in updates]
        return [RowBlock(0, self.weight.shape[0], updates)]

    def forward(self, x: Tensor) -> Tensor:
        """(…, out_features) from `x`, (…, in_features)."""
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        return self.add_branches(F.linear(x, weight, self.bias), x, self.unmerged_branches())

    def add_branches(self, y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
        for branch in branches:
            y = add_branch(y, low_rank(x, branch), branch.lora_B, branch.scaling)
        return y

    def delta(self, branch: Branch) -> Tensor:
        delta = wide_product(branch)
        return delta.T if self.fan_in_fan_out else delta

"""`Linear`: y = Wx + b + scaling · lora_B lora_A x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that torch's users know
from torch import Tensor, nn

from ...errors import LayerError
from ...kernel.merge import Precision
from ...kernel.undo.keep import UndoKind
from ...kernel.update import LowRankUpdate
from .adapted import RowBlock
from .lora_layer import Branch, add_branch, low_rank, wide_product
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


class MergedLinear(Linear):
    """`Linear` over len(enable_lora) blocks of rows, with an update of rank r for each block that is enabled.

    With n enabled blocks of `out_features / len(enable_lora)` rows:

    - `lora_A`: (r · n, in_features), `lora_B`: (rows of all enabled blocks, r); block i uses its own r rows of A and rows of B
    - `lora_ind`: (out_features,) bool, the rows that are enabled; a buffer that no state dict holds

    With nothing enabled it is a plain linear layer.

    Raises `LayerError` where the blocks do not divide `out_features`.

    >>> layer = MergedLinear(4, 6, r=2, enable_lora=[True, False, True])
    >>> layer.lora_A.shape, layer.lora_B.shape, layer.lora_ind
    (torch.Size([4, 4]), torch.Size([4, 2]), tensor([ True,  True, False, False,  True,  True]))
    """

    lora_ind: Tensor
    enable_lora: list[bool]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = [False],  # never written to; loralib's default
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        undo: UndoKind = "copy",
        precision: Precision = "exact",
        **kwargs: Any,
    ) -> None:
        if not enable_lora or out_features % len(enable_lora):
            raise LayerError(f"the length of enable_lora, {len(enable_lora)}, must divide out_features, {out_features}")
        self.__dict__["enable_lora"] = [bool(enabled) for enabled in enable_lora]  # before nn.Module is there to take it
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights,
            undo=undo, precision=precision, **kwargs,
        )  # fmt: skip
        if self.has_factors:
            rows = torch.tensor(self.enable_lora, dtype=torch.bool, device=self.weight.device).repeat_interleave(self.block_rows)
            self.register_buffer("lora_ind", rows, persistent=False)

    @property
    def block_rows(self) -> int:
        """Rows of one block."""
        return self.out_features // len(self.enable_lora)

    @property
    def enabled(self) -> list[int]:
        """The indices of the enabled blocks."""
        return [i for i, enabled in enumerate(self.enable_lora) if enabled]

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        n = len(self.enabled)
        return ((r * n, self.in_features), (self.block_rows * n, r)) if n else None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def row_blocks(self, branches: Sequence[Branch]) -> list[RowBlock]:
        parts = [self._parts(branch) for branch in branches]
        return [RowBlock(i * self.block_rows, self.block_rows, [part[k] for part in parts]) for k, i in enumerate(self.enabled)]

    def _parts(self, branch: Branch) -> list[LowRankUpdate]:
        """The update of each enabled block."""
        n = len(self.enabled)
        pairs = zip(branch.lora_A.chunk(n), branch.lora_B.chunk(n), strict=True)
        return [LowRankUpdate(lora_A, lora_B, branch.scaling) for lora_A, lora_B in pairs]

    def add_branches(self, y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
        if not branches:
            return y
        n = len(self.enabled)
        blocks = list(y.chunk(len(self.enable_lora), dim=-1))  # each (…, block_rows)
        for branch in branches:
            h = low_rank(x, branch).chunk(n, dim=-1)  # n of (…, r)
            for i, h_i, B_i in zip(self.enabled, h, branch.lora_B.chunk(n), strict=True):
                blocks[i] = add_branch(blocks[i], h_i, B_i, branch.scaling)
        return torch.cat(blocks, dim=-1)

    def delta(self, branch: Branch) -> Tensor:
        n = len(self.enabled)
        pairs = zip(branch.lora_A.chunk(n), branch.lora_B.chunk(n), strict=True)
        products = [wide_product(branch._replace(lora_A=lora_A, lora_B=lora_B)) for lora_A, lora_B in pairs]
        nothing = products[0].new_zeros(self.block_rows, self.in_features)
        by_block = dict(zip(self.enabled, products, strict=True))
        whole = torch.cat([by_block.get(i, nothing) for i in range(len(self.enable_lora))])
        return whole.T if self.fan_in_fan_out else whole

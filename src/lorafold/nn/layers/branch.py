"""The branches of a layer: one pair of factors each, of the layer's own adapter or of a named one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Branch(NamedTuple):
    """One adapter's part in a layer, as the forward pass and merging see it.

    - `lora_A`, `lora_B`: shapes as the layer's type has them
    - `scaling`: the factor of lora_B @ lora_A
    - `dropout`: applied to what goes into lora_A, in training
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    dropout: nn.Module


class BranchFactors(nn.Module):
    """The parameters of one named adapter in one layer: `lora_A` and `lora_B`, with their `r`, `lora_alpha` and `scaling`."""

    def __init__(self, lora_A: Tensor, lora_B: Tensor, *, r: int, lora_alpha: float, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = scaling
        self.lora_dropout: nn.Module = nn.Dropout(p=dropout) if dropout > 0.0 else nn.Identity()

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"


def low_rank(x: Tensor, branch: Branch) -> Tensor:
    """(…, r): what lora_A makes of `x`, (…, in_features), after dropout, in lora_A's dtype."""
    if not isinstance(branch.dropout, nn.Identity):
        x = branch.dropout(x)
    if x.dtype != branch.lora_A.dtype:
        x = x.to(branch.lora_A.dtype)
    return nn.functional.linear(x, branch.lora_A)


def add_branch(y: Tensor, h: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`y` + scaling · h @ lora_Bᵀ, in y's dtype; the sum is taken in the wider of both dtypes and rounded once.

    - `y`: (…, out_features); `h`: (…, r); `lora_B`: (out_features, r)
    """
    total = torch.add(y, nn.functional.linear(h, lora_B), alpha=scaling)
    return total if total.dtype == y.dtype else total.to(y.dtype)


def wide_product(branch: Branch) -> Tensor:
    """scaling · lora_B @ lora_A, in float32 at least: a float16 product would be slow on a CPU, and rounded once more."""
    wide = torch.promote_types(branch.lora_B.dtype, torch.float32)
    return (branch.lora_B.to(wide) @ branch.lora_A.to(wide)) * branch.scaling

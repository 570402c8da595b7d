"""`LoRALayer`: what every LoRA layer has, loralib's and anyone's own: settings, and branches, a pair of factors each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LayerError
from ...kernel.update import joint_dtype


class LoRALayer:
    """Mixin with a layer's LoRA settings: `r`, `lora_alpha`, `lora_dropout`, `merge_weights`, and whether it is `merged`.

    A layer of one's own, ``class Mine(nn.Linear, LoRALayer)``, calls `LoRALayer.__init__` after the module's. By this type
    `mark_only_lora_as_trainable` and `lora_state_dict` know it; they take its parameters whose names begin with ``lora_``.

    Raises `LayerError` where `r` is not an integer from 0 on, `lora_alpha` is not finite or `lora_dropout` is not in [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        check_settings(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout: nn.Module = nn.Dropout(p=lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


def check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raises `LayerError` unless the three are what a LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise LayerError(f"r must be an integer, 0 or more, not {r!r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise LayerError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if isinstance(lora_dropout, bool) or not 0.0 <= lora_dropout <= 1.0:
        raise LayerError(f"lora_dropout must be a probability from 0 to 1, not {lora_dropout!r}")


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
    wide = joint_dtype((branch.lora_B.dtype, torch.float32))
    return (branch.lora_B.to(wide) @ branch.lora_A.to(wide)) * branch.scaling

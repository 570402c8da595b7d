"""`ConvLoRA` and `Conv1d`, `Conv2d`, `Conv3d`: convolutions with a low-rank update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ...errors import LayerError
from ...kernel.merge import Precision
from ...kernel.undo.keep import UndoKind
from ...kernel.update import LowRankUpdate
from .adapted import RowBlock
from .lora_layer import Branch, wide_product
from .mergeable import Mergeable

_POINTWISE = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class ConvLoRA(Mergeable):
    """A convolution, `conv`, with a low-rank update of its weight.

    The weight, (out_channels, in_channels / groups, k_1, …, k_d), is read row by row as a matrix of (out_channels / groups · k,
    in_channels · rest), where k is k_1 for two and three dimensions and 1 for one, and rest is the product of the other sizes.
    For a square kernel of two dimensions that is loralib's layout.

    - `lora_A`: (r · k, in_channels · rest); `lora_B`: (out_channels / groups · k, r · k)
    - `weight`, `bias`: those of `conv`, which alone holds them

    State dicts hold ``conv.weight`` and ``conv.bias``; those that hold ``weight`` and ``bias``, of a plain convolution or of
    loralib's later versions, load as well.

    Raises `LayerError` for transposed convolutions, whose weights are laid out otherwise.

    >>> import torch
    >>> layer = ConvLoRA(nn.Conv2d, 3, 8, (3, 5), r=2)
    >>> layer.lora_A.shape, layer.lora_B.shape, layer(torch.zeros(1, 3, 9, 9)).shape
    (torch.Size([6, 15]), torch.Size([24, 6]), torch.Size([1, 8, 7, 5]))
    """

    def __init__(
        self,
        conv_module: Callable[..., _ConvNd],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        undo: UndoKind = "copy",
        precision: Precision = "exact",
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        if not isinstance(self.conv, _ConvNd) or self.conv.transposed:
            raise LayerError(f"a low-rank update needs a convolution of torch.nn that is not transposed, not {type(self.conv)}")
        Mergeable.__init__(self, r, lora_alpha, lora_dropout, merge_weights, undo=undo, precision=precision)
        self.reset_parameters()

    weight_name = "conv.weight"

    @property
    def weight_owner(self) -> nn.Module:
        return self.conv

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # a parameter of `conv`, which may replace it
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        self.reset_factors()

    @property
    def _kernel(self) -> tuple[int, int]:
        """(k, rest) as in the class's description."""
        sizes = self.conv.kernel_size
        k = sizes[0] if len(sizes) > 1 else 1
        return k, math.prod(sizes) // k

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        k, rest = self._kernel
        return (r * k, self.conv.in_channels * rest), (self.conv.out_channels // self.conv.groups * k, r * k)

    def init_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        nn.init.zeros_(lora_B)

    def matrix(self, weight: Tensor) -> Tensor:
        k, rest = self._kernel
        return weight.reshape(self.conv.out_channels // self.conv.groups * k, self.conv.in_channels * rest)

    def row_blocks(self, branches: Sequence[Branch]) -> list[RowBlock]:
        rows = self.conv.out_channels // self.conv.groups * self._kernel[0]
        return [RowBlock(0, rows, [LowRankUpdate(b.lora_A, b.lora_B, b.scaling) for b in branches])]

    def forward(self, x: Tensor) -> Tensor:
        """What `conv` makes of `x` with the updated weight."""
        branches = self.unmerged_branches()
        if not branches:
            return self._convolve(x, self.weight, self.bias)
        if self._is_factored or (self.training and any(isinstance(branch.dropout, nn.Dropout) for branch in branches)):
            return self.add_branches(self._convolve(x, self.weight, self.bias), x, branches)
        weight = self.weight
        for branch in branches:
            weight = weight + self.delta(branch)
        return self._convolve(x, weight.to(self.weight.dtype), self.bias)

    def add_branches(self, y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
        for branch in branches:
            y = (y + self._update_of(branch.dropout(x), branch)).to(y.dtype)
        return y

    @property
    def _is_factored(self) -> bool:
        """Whether lora_A is a convolution to r channels and lora_B one from them. Else ΔW, of the weight's size, must be formed."""
        return self._kernel[0] == 1 and self.conv.groups == 1

    def _update_of(self, x: Tensor, branch: Branch) -> Tensor:
        """What ΔW makes of `x`."""
        if not self._is_factored:
            return self._convolve(x, self.delta(branch).to(x.dtype), None)
        sizes = self.conv.kernel_size
        lora_A = branch.lora_A.view(-1, self.conv.in_channels, *sizes)
        lora_B = branch.lora_B.view(self.conv.out_channels, -1, *(1 for _ in sizes))
        h = self._convolve(x.to(lora_A.dtype), lora_A, None)  # r channels
        return _POINTWISE[len(sizes)](h, lora_B) * branch.scaling

    def delta(self, branch: Branch) -> Tensor:
        return wide_product(branch).view(self.weight.shape)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.conv._conv_forward(x, weight, bias)
        return y


class Conv1d(ConvLoRA):
    """`torch.nn.Conv1d` with a low-rank update; see `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA):
    """`torch.nn.Conv2d` with a low-rank update; see `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """`torch.nn.Conv3d` with a low-rank update; see `ConvLoRA`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)

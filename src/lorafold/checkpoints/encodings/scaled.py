"""Codes with a scale for each block of them: a tensor, a row, groups along a row, two-dimensional blocks; with ragged ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...files.evaluation import evaluate
from ...files.expression import Matrix, Node, narrow
from ...files.safetensors.info import TensorInfo


@dataclass(frozen=True)
class BlockScaled(Node):
    """The numbers of `codes`, each times the scale of its block, in float64, where the product of two stored floats is exact.

    - `scales`: as many dimensions as `codes`, and along each one entry a block
    - `block`: the size of a block along each dimension; the last of a dimension is cut short
    - `skipped`: numbers of the first block that come before those of `codes`, along each dimension
    - `divides`: the scale divides instead; the quotient is rounded once

    >>> from lorafold.files.expression import Identity, Zeros
    >>> BlockScaled(Zeros((3, 4)), Zeros((2, 2)), (2, 3)).narrow(0, 2, 1).scales
    Zeros(to=(1, 2))
    """

    codes: Matrix
    scales: Matrix
    block: tuple[int, ...]
    skipped: tuple[int, ...] = ()
    divides: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.codes, self.scales

    @property
    def _skipped(self) -> tuple[int, ...]:
        return self.skipped or (0,) * len(self.block)

    def value(self, *parts: Tensor) -> Tensor:
        codes, scales = parts[0].double(), self.spread(parts[1].double())
        return codes.div_(scales) if self.divides else codes.mul_(scales)

    def spread(self, scales: Tensor) -> Tensor:
        """`scales` with one entry for each number, or one along the dimensions that one block spans."""
        for dim, (size, block, skipped) in enumerate(zip(self.shape, self.block, self._skipped, strict=True)):
            if scales.shape[dim] > 1:
                of = torch.arange(skipped, skipped + size, device="cpu").div_(block, rounding_mode="floor")
                scales = scales.index_select(dim, of)
        return scales

    def scales_of(self, read: Callable[[TensorInfo], Tensor]) -> Tensor:
        """The scales in float64, spread as `spread` does it; `read` gives the numbers of stored tensors."""
        return self.spread(evaluate(self.scales, read).double())

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        first = self._skipped[dim] + start
        low, high = first // self.block[dim], -(-(first + count) // self.block[dim])
        skipped = (*self._skipped[:dim], first - low * self.block[dim], *self._skipped[dim + 1 :])
        codes, scales = narrow(self.codes, dim, start, count), narrow(self.scales, dim, low, high - low)
        return replace(self, codes=codes, scales=scales, skipped=skipped)


def blocks(sizes: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each dimension, the last one cut short.

    >>> blocks((576, 7168), (128, 128)), blocks((192, 64), (128, 128))
    ((5, 56), (2, 1))
    """
    return tuple(-(-size // each) for size, each in zip(sizes, block, strict=True))

"""Codes with a scale for each block of them: a tensor, a row, groups along a row, two-dimensional blocks; with ragged ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

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
        return self.times(as_double(parts[0]), self.along_rows(parts[1].double()))

    def times(self, codes: Tensor, scales: Tensor) -> Tensor:
        """`codes`, float64 and used up, times `scales`, from `along_rows` or `spread`."""
        multiply = codes.div_ if self.divides else codes.mul_
        if scales.shape[-2:-1] in ((), (1,), codes.shape[-2:-1]):
            return multiply(scales)
        ends = [0, *range(self.block[-2] - self._skipped[-2], codes.shape[-2], self.block[-2]), codes.shape[-2]]
        for i, (start, stop) in enumerate(pairwise(ends)):
            rows = codes[..., start:stop, :]
            (rows.div_ if self.divides else rows.mul_)(scales[..., i, None, :])
        return codes

    def along_rows(self, scales: Tensor) -> Tensor:
        """`scales` as `spread` has them, but one row for all rows of a block where these are many."""
        tall = len(self.block) > 1 and self.block[-2] >= _TALL
        return self._spread(scales, [dim for dim in range(len(self.block)) if not (tall and dim == len(self.block) - 2)])

    def spread(self, scales: Tensor) -> Tensor:
        """`scales` with one entry for each number, or one along the dimensions that one block spans."""
        return self._spread(scales, range(len(self.block)))

    def _spread(self, scales: Tensor, dims: Iterable[int]) -> Tensor:
        for dim in dims:
            size, block, skipped = self.shape[dim], self.block[dim], self._skipped[dim]
            if scales.shape[dim] > 1 < block and scales.shape[dim] * block == size and not skipped:
                scales = scales.unsqueeze(dim + 1).expand(*scales.shape[: dim + 1], block, *scales.shape[dim + 1 :])
                scales = scales.flatten(dim, dim + 1)
            elif scales.shape[dim] > 1 and block > 1:
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


_TALL = 16
"""Rows of a block from which on they are scaled together."""


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """(256,) float64: the numbers of the codes of a type of eight bits."""
    return torch.arange(256, dtype=torch.int16, device="cpu").to(torch.uint8).view(dtype).double()


def as_double(codes: Tensor) -> Tensor:
    """`codes` in float64, in new memory; those of eight bits are looked up, which is quicker than torch's conversion."""
    if codes.element_size() > 1 or codes.dtype == torch.bool:
        return codes.to(torch.float64, copy=True)
    return _table(codes.dtype).index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def blocks(sizes: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are along each dimension, the last one cut short.

    >>> blocks((576, 7168), (128, 128)), blocks((192, 64), (128, 128))
    ((5, 56), (2, 1))
    """
    return tuple(-(-size // each) for size, each in zip(sizes, block, strict=True))

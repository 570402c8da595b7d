"""Nodes that stand between stored codes and the numbers that scales multiply: a table, a constant, rounding, an index of groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...files.expression import Matrix, Node, narrow

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of the 16 codes of FP4 (OCP Microscaling Formats 1.0, table 5): bit 3 is the sign."""

_SIZES = (*(m / 8 for m in range(8)), *((1 + m / 8) * 2.0**e for e in range(3) for m in range(8)))
E2M3 = (*_SIZES, *(-each for each in _SIZES))
"""The numbers of the 64 codes of FP6 in E2M3 (the same, table 4): bit 5 is the sign."""


@dataclass(frozen=True)
class Constant(Node):
    """The numbers `values` in the shape `to`, float64; (n,) where no shape is given.

    >>> Constant((1.0, 2.0)).value()
    tensor([1., 2.], dtype=torch.float64)
    """

    values: tuple[float, ...]
    to: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values),) if self.to is None else self.to

    def value(self, *parts: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64, device="cpu").reshape(self.shape)


@dataclass(frozen=True)
class Valued(Node):
    """The number of each of `codes` in `table`, (n,), whose type it has; a code beyond its end is NaN."""

    codes: Matrix
    table: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> str:
        return self.table.dtype

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.codes, self.table

    def value(self, *parts: Tensor) -> Tensor:
        codes, table = parts
        if table.shape[0] < 256:
            table = torch.nn.functional.pad(table, (0, 256 - table.shape[0]), value=math.nan)
        return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return replace(self, codes=narrow(self.codes, dim, start, count))


@dataclass(frozen=True)
class Single(Node):
    """The numbers of `of` rounded to float32, plus `offset` in float32: bitsandbytes' scales that are codes themselves."""

    of: Matrix
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].float() + torch.tensor(self.offset, dtype=torch.float32, device="cpu")

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return replace(self, of=narrow(self.of, dim, start, count))


@dataclass(frozen=True)
class Gathered(Node):
    """Slices of `of` along `dim`, one for each place in `index`, (n,) integers: the groups of columns in act-order."""

    of: Matrix
    index: Matrix
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[: self.dim], *self.index.shape, *self.of.shape[self.dim + 1 :])

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.of, self.index

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].index_select(self.dim, parts[1].long())

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim == self.dim:
            return replace(self, index=narrow(self.index, 0, start, count))
        return replace(self, of=narrow(self.of, dim, start, count))

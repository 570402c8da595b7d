"""Expressions that multiply others. They yield float64, in which products of float32 are exact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .expression import Cut, Matrix, Node, narrow


@dataclass(frozen=True)
class _OfTwo(Node):
    """Of two expressions, in float64."""

    one: Matrix
    other: Matrix

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.one, self.other


@dataclass(frozen=True)
class Kron(_OfTwo):
    """The Kronecker product of two matrices."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0] * self.other.shape[0], self.one.shape[1] * self.other.shape[1]

    def value(self, *parts: Tensor) -> Tensor:
        one, other = (part.double() for part in parts)
        return (one[:, None, :, None] * other[None, :, None, :]).reshape(self.shape)  # torch.kron fails on some strides

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        size = self.other.shape[dim]
        if not size:
            return super().narrow(dim, start, count)
        low, high = start // size, -(-(start + count) // size)
        return Cut(replace(self, one=narrow(self.one, dim, low, high - low)), dim, start - low * size, start + count - low * size)


@dataclass(frozen=True)
class RowKron(_OfTwo):
    """Row i is the Kronecker product of row i of both: (n, p) and (n, q) give (n, p · q).

    (B₁A₁) ∘ (B₂A₂) = RowKron(B₁, B₂) @ RowKron(A₁ᵀ, A₂ᵀ)ᵀ: a product element by element of low ranks has their product as rank.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0], self.one.shape[1] * self.other.shape[1]

    def value(self, *parts: Tensor) -> Tensor:
        one, other = (part.double() for part in parts)
        return (one[:, :, None] * other[:, None, :]).flatten(1)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim:
            return super().narrow(dim, start, count)
        return RowKron(narrow(self.one, 0, start, count), narrow(self.other, 0, start, count))


@dataclass(frozen=True)
class Product(_OfTwo):
    """The matrix product, in float64, the products of each number added one after another: a library's order is its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0], self.other.shape[1]

    def value(self, *parts: Tensor) -> Tensor:
        one, other = (part.double() for part in parts)
        found = other.new_zeros(self.shape)
        step = max(1, _TILE // max(1, found.shape[1]))
        for start in range(0, found.shape[0], step):
            tile, rows = found[start : start + step], one[start : start + step]
            for k in range(other.shape[0]):
                tile += rows[:, k, None] * other[k]
        return found


_TILE = 1 << 16
"""Elements at once, which stay in the cache while products are added to them."""


@dataclass(frozen=True)
class Times(_OfTwo):
    """Element by element, in float64; `other` has the shape of `one`, or 1 where it is the same along a dimension."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].double() * parts[1].double()

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        same = self.other.shape[dim] == 1 != self.one.shape[dim]
        return Times(narrow(self.one, dim, start, count), self.other if same else narrow(self.other, dim, start, count))


@dataclass(frozen=True)
class Scaled(Node):
    """`of` times the number `by`, in float64."""

    of: Matrix
    by: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].double() * self.by

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return replace(self, of=narrow(self.of, dim, start, count))

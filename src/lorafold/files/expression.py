"""A tensor as an expression of stored tensors: stored, or others transposed, cut, joined, repeated and multiplied.

Formats differ in how they lay tensors out. Each reader of a format says with these nodes how its tensors become what the rest of
the program works with, and nothing after it knows the format. A node knows its shape, its type and the tensors that it is made
of; `evaluate` reads the numbers. Nodes that multiply yield float64, in which products of float32 are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .safetensors.dtypes import BITS
from .safetensors.info import TensorInfo

Matrix: TypeAlias = (
    "TensorInfo | Permuted | Reshaped | Cut | Joined | Diagonal | Kron | RowKron | Product | Times | Scaled | Identity | Zeros"
)
"""Any of the nodes. A `TensorInfo` is the tensor itself."""


@dataclass(frozen=True)
class _Node:
    """What all nodes but the stored tensor have in common; `dtype` is safetensors' name."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take once they are evaluated."""
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Permuted(_Node):
    """`of` with its dimensions in the order `dims`, as `torch.permute` has it. (1, 0) is the transpose."""

    of: Matrix
    dims: tuple[int, ...] = (1, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.of.shape[dim] for dim in self.dims)

    @property
    def dtype(self) -> str:
        return self.of.dtype


@dataclass(frozen=True)
class Reshaped(_Node):
    """The numbers of `of`, in their order, seen in another shape `to`."""

    of: Matrix
    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    @property
    def dtype(self) -> str:
        return self.of.dtype


@dataclass(frozen=True)
class Cut(_Node):
    """Every `step`-th slice of `of` from `start` to before `stop`, along `dim`."""

    of: Matrix
    dim: int
    start: int
    stop: int
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[: self.dim], len(range(self.start, self.stop, self.step)), *self.of.shape[self.dim + 1 :])

    @property
    def dtype(self) -> str:
        return self.of.dtype


@dataclass(frozen=True)
class Joined(_Node):
    """`parts` one after another along `dim`."""

    parts: tuple[Matrix, ...]
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.parts), *first[self.dim + 1 :])

    @property
    def dtype(self) -> str:
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F64"


@dataclass(frozen=True)
class Diagonal(_Node):
    """The matrices `parts` down the diagonal, zeros beside them."""

    parts: tuple[Matrix, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.parts), sum(part.shape[1] for part in self.parts)

    @property
    def dtype(self) -> str:
        dtypes = {part.dtype for part in self.parts}
        return dtypes.pop() if len(dtypes) == 1 else "F64"


@dataclass(frozen=True)
class Kron(_Node):
    """The Kronecker product of two matrices."""

    one: Matrix
    other: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0] * self.other.shape[0], self.one.shape[1] * self.other.shape[1]


@dataclass(frozen=True)
class RowKron(_Node):
    """Row i is the Kronecker product of row i of both: (n, p) and (n, q) give (n, p · q).

    (B₁A₁) ∘ (B₂A₂) = RowKron(B₁, B₂) @ RowKron(A₁ᵀ, A₂ᵀ)ᵀ: a product element by element of low ranks has their product as rank.
    """

    one: Matrix
    other: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0], self.one.shape[1] * self.other.shape[1]


@dataclass(frozen=True)
class Product(_Node):
    """The matrix product, in float64."""

    one: Matrix
    other: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape[0], self.other.shape[1]


@dataclass(frozen=True)
class Times(_Node):
    """Element by element, in float64; `other` has the shape of `one`, or 1 where it is the same along a dimension."""

    one: Matrix
    other: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape


@dataclass(frozen=True)
class Scaled(_Node):
    """`of` times the number `by`, in float64."""

    of: Matrix
    by: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape


@dataclass(frozen=True)
class Identity(_Node):
    """The identity of `size` rows."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    @property
    def dtype(self) -> str:
        return "F32"


@dataclass(frozen=True)
class Zeros(_Node):
    """Nothing but zeros."""

    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    @property
    def dtype(self) -> str:
        return "F32"


def tensors_of(matrix: Matrix) -> Iterator[TensorInfo]:
    """The stored tensors that `matrix` is made of, in the order they stand in it."""
    if isinstance(matrix, TensorInfo):
        yield matrix
    elif isinstance(matrix, Joined | Diagonal):
        for part in matrix.parts:
            yield from tensors_of(part)
    elif isinstance(matrix, Kron | RowKron | Product | Times):
        yield from tensors_of(matrix.one)
        yield from tensors_of(matrix.other)
    elif isinstance(matrix, Permuted | Reshaped | Cut | Scaled):
        yield from tensors_of(matrix.of)


def evaluate(matrix: Matrix, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The numbers of `matrix`, of its shape; `read` gives those of a stored tensor.

    >>> evaluate(Kron(Identity(2), Scaled(Identity(1), 3.0)), read=lambda info: torch.empty(info.shape))
    tensor([[3., 0.],
            [0., 3.]], dtype=torch.float64)
    """
    if isinstance(matrix, TensorInfo):
        return read(matrix)
    if isinstance(matrix, Identity):
        return torch.eye(matrix.size)
    if isinstance(matrix, Zeros):
        return torch.zeros(matrix.to)
    if isinstance(matrix, Joined | Diagonal):
        parts = [evaluate(part, read) for part in matrix.parts]
        if len({part.dtype for part in parts}) > 1:
            parts = [part.double() for part in parts]
        return torch.cat(parts, matrix.dim) if isinstance(matrix, Joined) else _diagonal(parts)
    if isinstance(matrix, Kron | RowKron | Product | Times):
        one, other = evaluate(matrix.one, read).double(), evaluate(matrix.other, read).double()
        if isinstance(matrix, Kron):
            return (one[:, None, :, None] * other[None, :, None, :]).reshape(matrix.shape)  # torch.kron fails on some strides
        if isinstance(matrix, RowKron):
            return (one[:, :, None] * other[:, None, :]).flatten(1)
        return one @ other if isinstance(matrix, Product) else one * other
    of = evaluate(matrix.of, read)
    if isinstance(matrix, Permuted):
        return of.permute(matrix.dims)
    if isinstance(matrix, Reshaped):
        return of.reshape(matrix.to)
    if isinstance(matrix, Scaled):
        return of.double() * matrix.by
    return of[(slice(None),) * matrix.dim + (slice(matrix.start, matrix.stop, matrix.step),)]


def _diagonal(parts: list[Tensor]) -> Tensor:
    rows, columns = (sum(part.shape[dim] for part in parts) for dim in (0, 1))
    whole = parts[0].new_zeros(rows, columns)
    row = column = 0
    for part in parts:
        whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        row, column = row + part.shape[0], column + part.shape[1]
    return whole

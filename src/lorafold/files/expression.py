"""A tensor as an expression of stored tensors: stored, or others transposed, cut, joined, repeated and multiplied.

Formats differ in how they lay tensors out, those of adapters and those of base checkpoints. Each reader of a format says with these
nodes how its tensors become what the rest of the program works with, and nothing after it knows the format. A node knows its shape,
its type, what it is made of, and its numbers given theirs; so a format that needs another node defines it where it is read.
`narrow` gives the expression of a part of one. Nodes that multiply are in products.py, and how numbers are read in evaluation.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .safetensors.info import BITS, TensorInfo

Matrix: TypeAlias = "TensorInfo | Node"
"""An expression. A `TensorInfo` is the tensor itself."""


@dataclass(frozen=True)
class Node:
    """What all expressions but the stored tensor have in common; `dtype` is safetensors' name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `value`."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """The type of `value`."""
        return "F64"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        """What it is made of, in the order in which it stands there."""
        return ()

    def value(self, *parts: Tensor) -> Tensor:
        """Its numbers, given those of its `parts`."""
        raise NotImplementedError

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        """`count` slices from `start` on along `dim`, made of as little as can be. Here: of everything."""
        return Cut(self, dim, start, start + count)

    @property
    def taken(self) -> int | None:
        """Bytes that it takes to evaluate it at most; None: what all nodes in it take together."""
        return None

    @property
    def numel(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take once they are evaluated."""
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True)
class _OfOne(Node):
    """The numbers of `of`, seen otherwise."""

    of: Matrix

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.of,)


@dataclass(frozen=True)
class Permuted(_OfOne):
    """`of` with its dimensions in the order `dims`, as `torch.permute` has it. (1, 0) is the transpose."""

    dims: tuple[int, ...] = (1, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.of.shape[dim] for dim in self.dims)

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].permute(self.dims)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return replace(self, of=narrow(self.of, self.dims[dim], start, count))


@dataclass(frozen=True)
class Reshaped(_OfOne):
    """The numbers of `of`, in their order, seen in another shape `to`."""

    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].reshape(self.to)

    def settled(self) -> Matrix:
        """The same, as a stored tensor where `of` is one."""
        return replace(self.of, shape=self.to) if isinstance(self.of, TensorInfo) else self

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        of, shape = self.of, (*self.to[:dim], count, *self.to[dim + 1 :])
        if isinstance(of, TensorInfo):
            return narrow(replace(of, shape=self.to), dim, start, count)
        if of.shape == (1, *self.to):
            return Reshaped(narrow(of, dim + 1, start, count), shape)
        if of.shape[: dim + 1] == self.to[: dim + 1]:
            return Reshaped(narrow(of, dim, start, count), shape)
        width = math.prod(of.shape[1:])
        if dim or not of.shape or not width:
            return super().narrow(dim, start, count)
        first, numel = start * math.prod(self.to[1:]), math.prod(shape)
        low, high = first // width, -(-(first + numel) // width)
        covering = narrow(of, 0, low, high - low)
        flat = Reshaped(covering, (covering.numel,))
        return Reshaped(Cut(flat, 0, first - low * width, first - low * width + numel), shape)


@dataclass(frozen=True)
class Cut(_OfOne):
    """Every `step`-th slice of `of` from `start` to before `stop`, along `dim`."""

    dim: int
    start: int
    stop: int
    step: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[: self.dim], len(range(self.start, self.stop, self.step)), *self.of.shape[self.dim + 1 :])

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0][(slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)]

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim != self.dim:
            return replace(self, of=narrow(self.of, dim, start, count))
        if self.step == 1:
            return narrow(self.of, dim, self.start + start, count)
        first = self.start + start * self.step
        return replace(self, start=first, stop=first + (count - 1) * self.step + 1 if count else first)


@dataclass(frozen=True)
class _Several(Node):
    """Of `several` expressions beside each other."""

    several: tuple[Matrix, ...]

    @property
    def dtype(self) -> str:
        dtypes = {part.dtype for part in self.several}
        return dtypes.pop() if len(dtypes) == 1 else "F64"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.several


@dataclass(frozen=True)
class Joined(_Several):
    """`several` one after another along `dim`."""

    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.several[0].shape
        return (*first[: self.dim], sum(part.shape[self.dim] for part in self.several), *first[self.dim + 1 :])

    def value(self, *parts: Tensor) -> Tensor:
        return torch.cat(_alike(parts), self.dim)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim != self.dim:
            return replace(self, several=tuple(narrow(part, dim, start, count) for part in self.several))
        within = _within([part.shape[dim] for part in self.several], start, count)
        found = tuple(narrow(part, dim, *place) for part, place in zip(self.several, within, strict=True) if place[1])
        if not found or len({part.dtype for part in found}) < len({part.dtype for part in self.several}):
            return super().narrow(dim, start, count)  # which would be of another type
        return found[0] if len(found) == 1 else Joined(found, dim)


@dataclass(frozen=True)
class Diagonal(_Several):
    """The matrices `several` down the diagonal, zeros beside them."""

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(part.shape[0] for part in self.several), sum(part.shape[1] for part in self.several)

    def value(self, *parts: Tensor) -> Tensor:
        matrices = _alike(parts)
        rows, columns = (sum(part.shape[dim] for part in matrices) for dim in (0, 1))
        whole = matrices[0].new_zeros(rows, columns)
        row = column = 0
        for part in matrices:
            whole[row : row + part.shape[0], column : column + part.shape[1]] = part
            row, column = row + part.shape[0], column + part.shape[1]
        return whole

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        within = _within([part.shape[dim] for part in self.several], start, count)
        return Diagonal(tuple(narrow(part, dim, *place) for part, place in zip(self.several, within, strict=True)))


@dataclass(frozen=True)
class Identity(Node):
    """The identity of `size` rows."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    @property
    def dtype(self) -> str:
        return "F32"

    def value(self, *parts: Tensor) -> Tensor:
        return torch.eye(self.size, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Zeros(Node):
    """Nothing but zeros."""

    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    @property
    def dtype(self) -> str:
        return "F32"

    def value(self, *parts: Tensor) -> Tensor:
        return torch.zeros(self.to, dtype=torch.float32, device="cpu")

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return Zeros((*self.to[:dim], count, *self.to[dim + 1 :]))


def tensors_of(matrix: Matrix) -> Iterator[TensorInfo]:
    """The stored tensors that `matrix` is made of, in the order they stand in it."""
    if isinstance(matrix, TensorInfo):
        yield matrix
    else:
        for part in matrix.parts:
            yield from tensors_of(part)


def narrow(matrix: Matrix, dim: int, start: int, count: int) -> Matrix:
    """`count` slices of `matrix` from `start` on along `dim`. Of a stored tensor, where they lie together, a stored tensor again.

    >>> narrow(Joined((Zeros((2, 3)), Identity(3))), 0, 1, 3)
    Joined(several=(Zeros(to=(1, 3)), Cut(of=Identity(size=3), dim=0, start=0, stop=2, step=1)), dim=0)
    """
    if (start, count) == (0, matrix.shape[dim]):
        return matrix
    if not isinstance(matrix, TensorInfo):
        return matrix.narrow(dim, start, count)
    each, rest = divmod(matrix.nbytes, max(1, matrix.shape[dim]))
    if rest or math.prod(matrix.shape[:dim]) != 1:
        return Cut(matrix, dim, start, start + count)
    first = matrix.start + start * each
    shape = (*matrix.shape[:dim], count, *matrix.shape[dim + 1 :])
    return replace(matrix, shape=shape, start=first, stop=first + count * each)


def _alike(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """`parts` in one type: theirs, or float64."""
    return list(parts) if len({part.dtype for part in parts}) == 1 else [part.double() for part in parts]


def _within(sizes: list[int], start: int, count: int) -> Iterator[tuple[int, int]]:
    """Which of `count` slices from `start` on are of each of several parts of these `sizes`: the first of them there, how many."""
    for size in sizes:
        low, high = min(max(start, 0), size), min(max(start + count, 0), size)
        yield low, high - low
        start -= size

"""The numbers of an expression: all of them, or some rows, of which no more is read than they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..arithmetic import undisturbed
from .expression import Cut, Joined, Matrix, Reshaped, narrow
from .safetensors.info import TensorInfo


def rows_of(matrix: Matrix, start: int, count: int, columns: int) -> Matrix:
    """(count, columns): rows of `matrix` from `start` on, where it is seen as a matrix of so many columns, its last dimensions."""
    if isinstance(matrix, TensorInfo):
        rows = matrix.numel // columns if columns else start + count
        return narrow(replace(matrix, shape=(rows, columns)), 0, start, count)
    leading = next((dims for dims in range(len(matrix.shape) + 1) if math.prod(matrix.shape[dims:]) == columns), 0)
    if leading == 0:
        matrix, leading = Reshaped(matrix, (1, columns)), 1
    return Reshaped(_rows(matrix, leading, start, count), (count, columns)).settled()


def _rows(matrix: Matrix, leading: int, start: int, count: int) -> Matrix:
    """The rows from `start` on, one for each place in the first `leading` dimensions."""
    if not matrix.numel:
        return matrix
    inner = math.prod(matrix.shape[1:leading])
    if start % inner == count % inner == 0:
        return narrow(matrix, 0, start // inner, count // inner)
    width, parts = math.prod(matrix.shape[leading:]), []
    for i in range(start // inner, -(-(start + count) // inner)):
        low, high = max(start - i * inner, 0), min(start + count - i * inner, inner)
        within = _rows(Reshaped(narrow(matrix, 0, i, 1), matrix.shape[1:]).settled(), leading - 1, low, high - low)
        parts.append(Reshaped(within, (high - low, width)).settled())
    return Joined(tuple(parts)) if len(parts) > 1 else parts[0]


_STRIDED = 1 << 22
"""Bytes of a stored tensor from which on slices that do not lie together are read one by one, and not all of it for them."""


def evaluate(matrix: Matrix, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The numbers of `matrix`, of its shape; `read` gives those of a stored tensor, or of slices of one as `narrow` makes them.

    >>> from lorafold.files.expression import Identity, Zeros
    >>> evaluate(Joined((Identity(1), Zeros((1, 1)))), read=lambda info: torch.empty(info.shape))
    tensor([[1.],
            [0.]])
    """
    if isinstance(matrix, TensorInfo):
        return read(matrix)
    with undisturbed():
        return _value(matrix, read)


def _value(matrix: Matrix, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    if isinstance(matrix, TensorInfo):
        return read(matrix)
    if isinstance(matrix, Cut) and isinstance(matrix.of, TensorInfo) and matrix.of.nbytes > _STRIDED:
        return _apart(matrix, matrix.of, read)
    return matrix.value(*(_value(part, read) for part in matrix.parts))


def _apart(cut: Cut, info: TensorInfo, read: Callable[[TensorInfo], Tensor]) -> Tensor:
    """The numbers of `cut`, of what lies together at a time."""
    outer, size = math.prod(info.shape[: cut.dim]), info.shape[cut.dim]
    whole = replace(info, shape=(outer * size, *info.shape[cut.dim + 1 :]))
    parts = [narrow(whole, 0, i * size + cut.start, max(0, cut.stop - cut.start)) for i in range(outer)]
    found = torch.stack([read(part) for part in parts if isinstance(part, TensorInfo)])
    return found[:, :: cut.step].reshape(cut.shape)


def footprint(matrix: Matrix) -> int:
    """Bytes that `evaluate` takes at most: of all nodes together; and of a large stored tensor that is cut, its slices."""
    if isinstance(matrix, TensorInfo):
        return matrix.nbytes
    if isinstance(matrix, Cut) and isinstance(matrix.of, TensorInfo) and matrix.of.nbytes > _STRIDED:
        return 2 * matrix.step * matrix.nbytes
    if (taken := matrix.taken) is not None:
        return taken
    return matrix.nbytes + sum(footprint(part) for part in matrix.parts)

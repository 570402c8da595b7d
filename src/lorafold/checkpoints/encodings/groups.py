"""Which group of a row each column is in, where weights are quantised in groups, in order or in act-order."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...files.expression import Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from .complaints import require, unfit
from .encoded import Read


def grouped_index(index: TensorInfo, columns: int, each: int, groups: int, read: Read) -> TensorInfo | None:
    """`index`, the group of each column; None where these are groups of `each` columns one after another.

    Raises `CheckpointError` where it has another length, or names a group that is not there.
    """
    require(index, ("I32", "I64"), (columns,))
    found = read(index).long()
    if bool((found == -1).all()):  # as compressed-tensors leaves it where columns are in order
        return None
    if bool((found == torch.arange(columns, device="cpu").div(each, rounding_mode="floor")).all()):
        return None
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= groups:
        raise unfit(index, f"groups from 0 to {groups - 1}", f"{low} to {high}")
    return index


def in_shape(matrix: Matrix, grid: tuple[int, ...]) -> Matrix:
    """`matrix` in the shape `grid`."""
    if isinstance(matrix, TensorInfo):
        return replace(matrix, shape=grid)
    return matrix if matrix.shape == grid else Reshaped(matrix, grid)

"""W + ΔW in float64, and the norms of its rows and columns: what DoRA and its like rescale by.

Not correctly rounded, but defined, so that the bits are the same on every machine, with every BLAS and number of threads, and
however the rows are cut: each s · B_ik is rounded to float64, its product with A_kj is rounded, and the products are added to W_ij
one after another, k upward, update after update, each sum rounded. So, to first order,

    |result − real sum| ≤ (R + 2) · 2⁻⁵³ · (|W_ij| + Σ_k |s B_ik A_kj|)

(Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).

Only operations on single elements are used, each by itself: reductions and products of matrices add in an order of their own, and
what is fused rounds once instead of twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .numerics import one_thread, subnormal_numbers
from .update import LowRankUpdate

_TILE = 1 << 16  # elements at once, which stay in the cache while R products are added to them


def wide_sum(matrix: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """(rows, columns) float64: W + Σ scaling · B A, see above.

    - `matrix`: W, (rows, columns), any floating dtype
    - `updates`: of its shape, on its device

    >>> wide_sum(torch.ones(1, 2), [LowRankUpdate(torch.ones(1, 2), torch.ones(1, 1), 0.5)])
    tensor([[1.5000, 1.5000]], dtype=torch.float64)
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        total = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        step = max(1, _TILE // max(1, matrix.shape[1]))
        product = torch.empty_like(total[:step])
        for update in updates:
            scaled_B, lora_A = update.lora_B.double() * update.scaling, update.lora_A.double()
            for start in range(0, total.shape[0], step):
                tile = total[start : start + step]
                room = product[: tile.shape[0]]
                for k in range(update.r):
                    tile += torch.mul(scaled_B[start : start + step, k, None], lora_A[k], out=room)
        return total


def row_norms(matrix: Tensor) -> Tensor:
    """(rows,) float64: √Σ_j x_ij² of a float64 `matrix`, the squares added in pairs: the first half to the second, and so on."""
    with torch.no_grad(), subnormal_numbers(), one_thread():
        squares = matrix.square()
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            low, high, rest = squares[:, :half], squares[:, half : 2 * half], squares[:, 2 * half :]
            low += high
            if rest.shape[1]:
                low[:, :1] += rest
            squares = low
        return squares.sum(dim=1).sqrt_()  # of one number


def add_column_squares(squares: Tensor, matrix: Tensor) -> None:
    """Add the squares of a float64 `matrix` to `squares`, (columns,) float64, row after row: no bit depends on the blocks."""
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for row in matrix.square():
            squares += row

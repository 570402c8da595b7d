"""W + ΔW in float64, and the lengths of its rows and columns: what DoRA and its like rescale by.

Not correctly rounded, but defined, so that the bits are the same on every machine, with every BLAS and number of threads, compiled
or not, and however the rows are cut. fl( ) is what rounds to float64, to nearest:

- ΔW_ij = fl(s · D), where D is the sum of fl(B_ik · A_kj) over k upward, each addition rounded, from +0 on; (W + ΔW)_ij = fl(W_ij +
  ΔW_ij). Of factors that float32 holds no product is rounded. To first order

      |result − real sum| ≤ (r + 2) · 2⁻⁵³ · (|W_ij| + Σ_k |s B_ik A_kj|)

  (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): r additions or products, that with s, and that of W.
- The length of a row is fl(√S). Each square is rounded; the squares of columns j, j + 64, j + 128 … are added up in this order, and
  of the 64 sums the second half is added to the first, until one is left. It is within (columns / 128 + 6) · 2⁻⁵³ of the real one.
- The length of a column likewise, but that its squares are added row after row.

Only operations on single elements are used, each by itself: reductions and products of matrices add in an order of their own, and
what is fused rounds once instead of twice. `cpu/rescale.h` does the same, with the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .update import LowRankUpdate

_TILE = 1 << 16  # elements at once, which stay in the cache while R products are added to them
_SUMS = 64  # of squares, side by side


def wide_delta(update: LowRankUpdate) -> Tensor:
    """(rows, columns) float64: ΔW, see above.

    >>> wide_delta(LowRankUpdate(torch.ones(1, 2), torch.ones(1, 1), 0.5))
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        lora_B, lora_A = update.lora_B.double(), update.lora_A.double()
        delta = lora_A.new_zeros(update.shape)
        step = max(1, _TILE // max(1, delta.shape[1]))
        fused = torch.float64 not in (update.lora_A.dtype, update.lora_B.dtype)  # whatever that rounds, products are not
        for start in range(0, delta.shape[0], step):
            tile, of_rows = delta[start : start + step], lora_B[start : start + step]
            product = tile if fused else torch.empty_like(tile)
            for k in range(update.r):
                if fused:
                    tile.addcmul_(of_rows[:, k, None], lora_A[k])
                else:
                    tile += torch.mul(of_rows[:, k, None], lora_A[k], out=product)
        return delta.mul_(update.scaling)


def row_lengths(matrix: Tensor) -> Tensor:
    """(rows,) float64: √Σ_j x_ij² of a float64 `matrix`, the squares added as told above."""
    with torch.no_grad(), subnormal_numbers(), one_thread():
        squares = matrix.square()
        sums = squares.new_zeros(matrix.shape[0], _SUMS)
        for start in range(0, matrix.shape[1], _SUMS):
            here = squares[:, start : start + _SUMS]
            sums[:, : here.shape[1]] += here
        while sums.shape[1] > 1:
            half = sums.shape[1] // 2
            sums = sums[:, :half] + sums[:, half:]
        return _roots(sums[:, 0])


def _roots(numbers: Tensor) -> Tensor:
    """Their square roots, to nearest: torch's own may come from MKL, which is off by a last bit now and then."""
    return torch.tensor([math.sqrt(x) for x in numbers.tolist()], dtype=torch.float64, device=numbers.device)


def add_squares(squares: Tensor, matrix: Tensor) -> None:
    """Add the squares of a float64 `matrix` to `squares`, (columns,) float64, row after row: no bit depends on the blocks."""
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for row in matrix.square():
            squares += row


def column_lengths(squares: Tensor, each: int = 1) -> Tensor:
    """(columns,) float64: the roots of sums of squares, (columns,); where `each` columns are one output, the length of theirs.

    >>> column_lengths(torch.tensor([9.0, 16.0, 4.0, 0.0], dtype=torch.float64), 2)
    tensor([5., 5., 2., 2.], dtype=torch.float64)
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        return row_lengths(_roots(squares).view(-1, each)).repeat_interleave(each)

"""Matrix products to twice the digits of float64, with the same bits on every machine.

A library's product of two matrices is off by some of its last bits, others on every machine. Here the factors are cut into slices
of so few bits that the products of slices are exact, whatever the order of their sums; then those are added without error (Ozaki,
Ogita, Oishi, Rump: Error-free transformations of matrix multiplication, Numerical Algorithms 59, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BITS = 106
"""Of which slices are made: two float64's."""


def product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`one` @ `other` as the sum of two float64 matrices, the first of which is the sum rounded.

    Off by some 2⁻¹⁰⁴ of the largest number in the row times the largest in the column, times the number of products.

    - `one`: (rows, inner), `other`: (inner, columns), float64

    >>> third = torch.tensor([[1 / 3, -1 / 3]], dtype=torch.float64)
    >>> high, low = product(third, torch.tensor([[3.0], [3.0 - 2.0**-51]], dtype=torch.float64))
    >>> float(high) == 2.0**-51 / 3, float(low)
    (True, 0.0)
    """
    inner = max(1, one.shape[1])
    bits = (53 - math.ceil(math.log2(inner))) // 2
    count = math.ceil(_BITS / bits)
    turned = one.numel() < other.numel()  # the larger one is cut as it goes, so that its slices need not be kept
    large, small = (other, one) if turned else (one, other)
    kept = list(_slices(small, 1 if turned else 0, bits, count))
    high = low = one.new_zeros(one.shape[0], other.shape[1])
    for i, piece in enumerate(_slices(large, 0 if turned else 1, bits, count)):
        for each in kept[: count + 1 - i]:
            high, error = _two_sum(high, each @ piece if turned else piece @ each)
            low = low + error
    return _two_sum(high, low)


def _slices(matrix: Tensor, dim: int, bits: int, count: int) -> Iterator[Tensor]:
    """`matrix` as a sum of matrices whose numbers are, along `dim`, multiples of one power of two, of `bits` bits each."""
    for _ in range(count):
        largest = matrix.abs().amax(dim, keepdim=True)
        if not largest.any():
            return
        above = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent + 53 - bits)
        piece = (matrix + 0.75 * above) - 0.75 * above
        yield piece
        matrix = matrix - piece


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and what rounding took from it (Knuth, The Art of Computer Programming, volume 2, section 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)

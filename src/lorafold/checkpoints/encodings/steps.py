"""Numbers between the values that codes have: which of the two neighbours each gets."""

from __future__ import annotations

import torch
from torch import Tensor


def between(numbers: Tensor, values: Tensor, uniform: Tensor | None) -> Tensor:
    """The place in `values` of the neighbour that each of `numbers` gets, int64; what is beyond an end gets that end.

    - `numbers`: float64; NaN gets any place
    - `values`: (n,) float64, rising
    - `uniform`: of the shape of `numbers`, in (0, 1): the upper neighbour where the share of the way to it exceeds this number.
      None: the nearer neighbour, of two that are as near the one at an even place

    >>> numbers, values = torch.tensor([0.5, 1.2, 1.6, 9.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0]).double()
    >>> between(numbers, values, None), between(numbers, values, torch.full((4,), 0.1))
    (tensor([0, 1, 2, 2]), tensor([1, 2, 2, 2]))
    """
    last = values.shape[0] - 1
    low = torch.bucketize(numbers, values, right=True).sub_(1).clamp_(0, max(0, last - 1))
    below, above = values[low], values[(low + 1).clamp_(max=last)]
    share = (numbers - below) / (above - below)
    up = ((share > 0.5) | ((share == 0.5) & (low & 1 == 1))) if uniform is None else share > uniform
    return low + up.to(low.dtype)

"""What kinds of adapters do to a weight that is no sum: rotate its rows, multiply it, or both; W as float64.

Not correctly rounded, but defined, so that the bits are the same on every machine: every operation is on single elements, in the
order that stands here, each rounded to float64; only the result is rounded to the weight's own type. W is (out, rest).

The formulas are those by which LyCORIS's layers compute (`lycoris/modules`: diag_oft, boft, glora, ia3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .update import LowRankUpdate
from .wide import row_lengths, wide_delta

_EPS = 1e-8
"""What LyCORIS adds to the norm that it limits."""


def cayley(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """R = (I + Q)(I − Q)⁻¹ of each block, Q being blocks − blocksᵀ, shrunk where its norm over all blocks is above `limit` > 0.

    I − Q is taken apart without exchange of rows: its symmetric part is I, so no pivot is smaller than 1.

    - `blocks`: (…, s, s) float64

    >>> cayley(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]).double())
    tensor([[[ 0.,  1.],
             [-1.,  0.]]], dtype=torch.float64)
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        Q = blocks - blocks.transpose(-1, -2)
        norm = float(row_lengths(Q.reshape(1, -1))[0]) + _EPS
        if limit > 0 and norm > limit:
            Q = Q * limit / norm
        s = Q.shape[-1]
        identity = torch.eye(s, dtype=torch.float64, device="cpu")
        both = torch.cat([identity - Q, identity + Q], -1)  # (…, s, 2s); the two factors commute
        for pivot in range(s):
            row = both[..., pivot, :] / both[..., pivot, pivot, None]
            column = both[..., :, pivot].clone()
            column[..., pivot] = 0.0
            both -= column[..., :, None] * row[..., None, :]
            both[..., pivot, :] = row
        return both[..., s:].clone()


def rotated(weight: Tensor, blocks: Tensor, limit: float, rescale: Tensor | None, strength: float) -> Tensor:
    """OFT: rows of block k become Rₖᵀ Wₖ, R being m R + (1 − m) I, and are multiplied by `rescale` after.

    - `weight`: (out, rest), `blocks`: (k, s, s) with k · s = out, `rescale`: (out,); float64
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        R = _part(cayley(blocks, limit), strength)
        count, size, _ = R.shape
        found = _product(R.transpose(-1, -2), weight.reshape(count, size, -1)).reshape(weight.shape)
        return found if rescale is None else found * rescale[:, None]


def butterflied(weight: Tensor, blocks: Tensor, limit: float, rescale: Tensor | None, strength: float) -> Tensor:
    """BOFT: stage after stage, the rows are regrouped with stride 2ⁱ · s / 2, and those of each group become R W.

    - `weight`: (out, rest), `blocks`: (stages, k, s, s) with k · s = out, `rescale`: (out,); float64
    """
    with torch.no_grad(), subnormal_numbers(), one_thread():
        R = _part(cayley(blocks, limit), strength)
        stages, count, size, _ = R.shape
        rest, found = weight.shape[1], weight
        for i in range(stages):
            stride = 2**i * size // 2
            found = found.reshape(-1, 2, stride, rest).transpose(1, 2).reshape(count, size, rest)
            found = _product(R[i], found).reshape(-1, stride, 2, rest).transpose(1, 2).reshape(weight.shape)
        return found if rescale is None else found * rescale[:, None]


def generalised(weight: Tensor, a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, factor: float) -> Tensor:
    """GLoRA: W + `factor` · (W a1 a2 + b1 b2).

    - `a1`: (rest, r), `a2`: (r, rest), `b1`: (out, r), `b2`: (r, rest); float64
    """
    inner = wide_delta(LowRankUpdate(a1, weight, 1.0))  # (out, r)
    with torch.no_grad(), subnormal_numbers(), one_thread():
        return weight + wide_delta(LowRankUpdate(a2, inner, factor)) + wide_delta(LowRankUpdate(b2, b1, factor))


def multiplied(weight: Tensor, vector: Tensor, strength: float, *, on_input: bool) -> Tensor:
    """IA³: W ∘ (1 + `strength` · w), w of the outputs, or of the inputs, each of which has as many columns; float64."""
    with torch.no_grad(), subnormal_numbers(), one_thread():
        factors = 1 + strength * vector
        if not on_input:
            return weight * factors[:, None]
        return weight * factors.repeat_interleave(weight.shape[1] // factors.shape[0])[None, :]


def _part(R: Tensor, strength: float) -> Tensor:
    if strength == 1.0:
        return R
    return strength * R + (1 - strength) * torch.eye(R.shape[-1], dtype=torch.float64, device="cpu")


def _product(R: Tensor, weight: Tensor) -> Tensor:
    """R W of each block, the products added one after another: R (k, s, s), W (k, s, rest)."""
    found = torch.zeros_like(weight)
    for j in range(R.shape[-1]):
        found += R[:, :, j, None] * weight[:, j, None, :]
    return found

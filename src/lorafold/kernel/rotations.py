"""What OFT and BOFT do to a weight, which is no sum: they rotate its rows; W as float64.

Not correctly rounded, but defined, so that the bits are the same on every machine: every operation is on single elements, in the
order that stands here, each rounded to float64; only the result is rounded to the weight's own type. W is (out, rest).

The formulas are those by which LyCORIS's layers compute (`lycoris/modules`: diag_oft, boft).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .wide import row_lengths

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


@dataclass(frozen=True, eq=False)
class RowRotation:
    """What is done to the rows of a weight, block by block and stage by stage.

    - `matrices`: (stages, blocks, size, size) float64: the rows of a block become this product with them
    - `rescale`: (rows,) float64, what rows are multiplied by in the end, or None
    - `butterfly`: whether the rows of a block of stage n are those that lie 2ⁿ · size / 2 apart; else one after another
    """

    matrices: Tensor
    rescale: Tensor | None = None
    butterfly: bool = False
    _packed: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def once(self, build: str, make: Callable[[], Tensor]) -> Tensor:
        """The matrices as a `build` of compiled code reads them, made by `make` the first time."""
        if build not in self._packed:
            self._packed[build] = make()
        return self._packed[build]

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return int(self.matrices.shape[1] * self.matrices.shape[2])

    @property
    def group(self) -> int:
        """Rows, one after another, that depend on each other and on no more."""
        return int(self.matrices.shape[2] << (self.matrices.shape[0] - 1))

    def of_rows(self, weight: Tensor, first: int) -> Tensor:
        """(rows, rest) float64: what becomes of `weight`, float64, whole groups of rows, from the row `first` on."""
        stages, _, size, _ = self.matrices.shape
        rest, found = weight.shape[1], weight
        blocks = slice(first // size, (first + weight.shape[0]) // size)
        with torch.no_grad(), subnormal_numbers(), one_thread():
            for i in range(stages):
                stride = 2**i * size // 2
                if self.butterfly:
                    found = found.reshape(-1, 2, stride, rest).transpose(1, 2)
                found = _product(self.matrices[i, blocks], found.reshape(-1, size, rest))
                if self.butterfly:
                    found = found.reshape(-1, stride, 2, rest).transpose(1, 2)
                found = found.reshape(weight.shape)
            return found if self.rescale is None else found * self.rescale[first : first + weight.shape[0], None]


def oft(blocks: Tensor, limit: float, rescale: Tensor | None, strength: float) -> RowRotation:
    """OFT: rows of block k become Rₖᵀ Wₖ, R being m R + (1 − m) I, and are multiplied by `rescale` after.

    - `blocks`: (k, s, s) with k · s = out, `rescale`: (out,); float64
    """
    return RowRotation(_part(cayley(blocks, limit), strength).transpose(-1, -2)[None], rescale)


def boft(blocks: Tensor, limit: float, rescale: Tensor | None, strength: float) -> RowRotation:
    """BOFT: stage after stage, the rows are regrouped with stride 2ⁱ · s / 2, and those of each group become R W.

    - `blocks`: (stages, k, s, s) with k · s = out, `rescale`: (out,); float64
    """
    return RowRotation(_part(cayley(blocks, limit), strength), rescale, butterfly=True)


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

"""What a step does to the tensor that it starts from: adds updates, and with DoRA rescales the sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernel import Kept, Rounding, merge_weight
from ..update import LowRankUpdate


@dataclass(frozen=True, eq=False)
class Rescale:
    """DoRA: each output's weights are brought to a trained length.

    W′ = W + strength · (m / ‖W + ΔW‖ · (W + ΔW) − W), the norm over the weights of one output; arXiv:2402.09353, equation 5.

    - `magnitude`: m, (outputs,) float64
    - `norms`: ‖W + ΔW‖ of each output, (outputs,) float64, where an output is a column of the matrix; None where it is a row
    """

    magnitude: Tensor
    strength: float = 1.0
    norms: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NewValues:
    """Rows `indices` (n,) of a matrix get the numbers `values` (n, columns)."""

    indices: Tensor
    values: Tensor

    def narrow(self, start: int, count: int) -> NewValues:
        """Those of rows `start` to `start + count`, counted from `start`."""
        here = (self.indices >= start) & (self.indices < start + count)
        return NewValues(self.indices[here] - start, self.values[here])

    def put(self, matrix: Tensor) -> None:
        """Write them into `matrix`, rounded once to its dtype."""
        matrix[self.indices] = merge_weight(self.values, [], out=torch.empty(self.values.shape, dtype=matrix.dtype))


@dataclass(frozen=True, eq=False)
class Change:
    """The updates that are added to a matrix, what is done to the sum, and rows put in last; all are the whole matrix's."""

    updates: tuple[LowRankUpdate, ...] = ()
    rescale: Rescale | None = None
    rows: NewValues | None = None

    def narrow(self, start: int, count: int) -> Change:
        """The change of rows `start` to `start + count`."""
        rescale = self.rescale
        if rescale is not None and rescale.norms is None:
            rescale = Rescale(rescale.magnitude[start : start + count], rescale.strength)
        rows = None if self.rows is None else self.rows.narrow(start, count)
        return Change(tuple(update.narrow(0, start, count) for update in self.updates), rescale, rows)


def wide_sum(matrix: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
    """W + ΔW in float64, from sums in float64."""
    return merge_weight(matrix, updates, out=torch.empty(matrix.shape, dtype=torch.float64))


def rescaled(matrix: Tensor, change: Change, out: Tensor, rounding: Rounding) -> Kept:
    """Fill `out` with DoRA's weight: the formula in float64, rounded once. How much of the change that kept.

    `matrix`, `out`: (rows, columns); `change`: of these rows, with a `rescale`.
    """
    rescale = change.rescale
    if rescale is None:
        raise ValueError("a change without a rescale")
    base, total = matrix.double(), wide_sum(matrix, change.updates)
    if rescale.norms is None:
        factors = (rescale.magnitude / torch.linalg.vector_norm(total, dim=1))[:, None]  # (rows, 1)
    else:
        factors = (rescale.magnitude / rescale.norms)[None, :]  # (1, columns)
    moved = total.mul_(factors).sub_(base).mul_(rescale.strength)  # what is added to W
    nothing = LowRankUpdate(torch.zeros(1, matrix.shape[1]), torch.zeros(matrix.shape[0], 1), 1.0)
    merge_weight(base + moved, [nothing], out=out, precision="exact", rounding=rounding)
    return Kept(float(((out.double() - base) * moved).sum()), float((moved * moved).sum()))

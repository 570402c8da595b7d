"""What a step does to the tensor that it starts from: takes something out, adds updates, and with DoRA rescales the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..adapters.adapter import Rule
from ..kernel.factors import Factors, stack
from ..kernel.merge import merge_weight
from ..kernel.rounding import Rounding
from ..kernel.stats import Kept
from ..kernel.update import LowRankUpdate
from ..kernel.wide import row_norms, wide_sum


@dataclass(frozen=True, eq=False)
class Rescale:
    """DoRA: each output's weights are brought to a trained length.

    W′ = W + strength · (m / ‖W + ΔW‖ · (W + ΔW) − W), the norm over the weights of one output; arXiv:2402.09353, equation 5.
    LyCORIS adds `EPS` to the norm and counts the strength from the sum: W′ = (1 + strength · (m / ‖W + ΔW‖ − 1)) · (W + ΔW)
    (`lycoris/functional/general.py`, `weight_decompose`).

    - `magnitude`: m, (outputs,) float64
    - `norms`: ‖W + ΔW‖ of each output, (outputs,) float64, where an output is a column of the matrix; None where it is a row
    - `rule`: ``"peft"`` or ``"lycoris"``
    """

    magnitude: Tensor
    strength: float = 1.0
    norms: Tensor | None = None
    rule: Rule = "peft"

    def factors(self, norms: Tensor, start: int) -> Tensor:
        """m / ‖W + ΔW‖ of the outputs from number `start` on, whose `norms` are given."""
        eps = EPS if self.rule == "lycoris" else 0.0
        return self.magnitude[start : start + norms.shape[0]] / (norms + eps)


EPS = torch.finfo(torch.float32).eps
"""LyCORIS trains in float32, and adds that type's step at 1 to the norm."""


@dataclass(frozen=True, eq=False)
class NewValues:
    """Rows `indices` (n,) of a matrix get the numbers `values` (n, columns), with `updates` of n rows added to them."""

    indices: Tensor
    values: Tensor
    updates: tuple[LowRankUpdate, ...] = ()

    def narrow(self, start: int, count: int) -> NewValues:
        """Those of rows `start` to `start + count`, counted from `start`."""
        here = (self.indices >= start) & (self.indices < start + count)
        updates = tuple(replace(update, lora_B=update.lora_B[here]) for update in self.updates)
        return NewValues(self.indices[here] - start, self.values[here], updates)

    def put(self, matrix: Tensor) -> None:
        """Write them into `matrix`, the sum rounded once to its dtype, to nearest."""
        if not self.indices.numel():
            return
        out = torch.empty_like(self.values, dtype=matrix.dtype)
        matrix[self.indices] = merge_weight(self.values, self.updates, out=out)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows `start` to `stop` of a matrix, and the `updates` that are added to them, each of just these rows."""

    start: int
    stop: int
    updates: tuple[LowRankUpdate, ...] = ()

    @cached_property
    def factors(self) -> Factors | None:
        """The updates, stacked; what merging derives from them is kept with the piece."""
        return stack(self.updates) if self.updates else None


@dataclass(frozen=True, eq=False)
class Stage:
    """One of several updates that do not commute: it is added, and then rescales what there is, if it does.

    - `rows`: which rows (start, stop) of the matrix it is for, and rescales; None for all of them
    """

    update: LowRankUpdate
    rescale: Rescale | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Change:
    """The updates that are added to a matrix, what is done to the sum, and rows put in last; all are the whole matrix's.

    - `pieces`: in order, and together the whole matrix
    - `stages`: the same updates in the order in which they count, where one of them rescales; then there is one piece
    - `first`: what is added before all else, and the sum rounded to the matrix's own dtype: the residual that an adapter was
      trained on
    - `whole`: the new matrix, float64, where it is no sum; then nothing else is done
    """

    pieces: tuple[Piece, ...]
    stages: tuple[Stage, ...] = ()
    rows: NewValues | None = None
    first: LowRankUpdate | None = None
    whole: Tensor | None = None

    @property
    def adds(self) -> bool:
        """Whether anything is added."""
        return self.whole is not None or any(piece.updates for piece in self.pieces)

    @property
    def transforms(self) -> bool:
        """Whether more is done than to add."""
        return bool(self.stages) or self.rows is not None or self.first is not None or self.whole is not None

    def within(self, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that rows `start` to `stop` are of, and which rows of the matrix are of each and of these."""
        for piece in self.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                yield piece, low, high

    def piece(self, row: int) -> Piece:
        """The piece that has the row `row`."""
        return next(piece for piece in self.pieces if piece.start <= row < piece.stop)

    def begin(self, matrix: Tensor, start: int) -> Tensor:
        """What the updates are added to: the rows `matrix` of the base, from `start` on, without what was taken out of them."""
        if self.first is None:
            return matrix
        taken = self.first.narrow(0, start, matrix.shape[0])
        return merge_weight(matrix, [taken], out=torch.empty_like(matrix), precision="exact")


def cut(rows: int, placed: Sequence[tuple[int, LowRankUpdate]]) -> tuple[Piece, ...]:
    """The pieces of a matrix of `rows` rows to which each update is added from the row beside it on."""
    ends = sorted({0, rows, *(end for start, update in placed for end in (start, start + update.shape[0]))})
    return tuple(
        Piece(
            low,
            high,
            tuple(u.narrow(0, low - start, high - low) for start, u in placed if start <= low and high <= start + u.shape[0]),
        )
        for low, high in pairwise(ends)
    )


def rescaled(matrix: Tensor, stages: Sequence[Stage], start: int, out: Tensor, rounding: Rounding) -> Kept:
    """Fill `out` with what `stages` make of W: the formula in float64, rounded once. How much of the change that kept.

    W + ΔW and its norms are those of `kernel.wide`; each operation of the formula is rounded to float64, the result to out's
    dtype.

    W_k = m_k / ‖W + ΔW_k‖ · (W_{k−1} + ΔW_k) for those that rescale, with the norm of the weight before any of them, as PEFT's
    layers do from 0.21.2 on (huggingface/peft#3608); W_k = W_{k−1} + ΔW_k for the others.

    `matrix`, `out`: (rows, columns), the rows from `start` on.
    """
    base = matrix.double()
    moved = torch.zeros_like(base)  # what is added to W
    for i, stage in enumerate(stages):
        first, stop = (0, start + matrix.shape[0]) if stage.rows is None else stage.rows
        low, high = max(first, start), min(stop, start + matrix.shape[0])
        if low < high:
            here = slice(low - start, high - start)
            alone = not any(_meet(stage.rows, before.rows) for before in stages[:i])
            moved[here] = _moved(matrix[here], moved[here], stage, low - first, alone=alone)
    return rounded(base, base + moved, moved, out, rounding)


def rounded(base: Tensor, total: Tensor, moved: Tensor, out: Tensor, rounding: Rounding) -> Kept:
    """Fill `out` with `total`, rounded to its dtype; how much of what was `moved` from `base` to there that kept. All float64."""
    nothing = LowRankUpdate(base.new_zeros(1, base.shape[1]), base.new_zeros(base.shape[0], 1), 1.0)
    merge_weight(total, [nothing], out=out, precision="exact", rounding=rounding)
    return Kept(float(((out.double() - base) * moved).sum()), float((moved * moved).sum()))


def _meet(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    """Whether two ranges of rows have one in common; None has all."""
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])


def _moved(matrix: Tensor, before: Tensor, stage: Stage, start: int, *, alone: bool) -> Tensor:
    """What is added to W after `stage`, of the rows that are from `start` on those of its update; `before`: what was added first.

    `alone`: whether nothing was. float64.
    """
    base, rescale = matrix.double(), stage.rescale
    update = stage.update.narrow(0, start, matrix.shape[0])
    own = wide_sum(matrix, [update])
    total = own if alone else wide_sum(base + before, [update])
    if rescale is None:
        return total.sub_(base)
    if rescale.norms is None:
        factors = rescale.factors(row_norms(own), start)[:, None]  # (rows, 1)
    else:
        factors = rescale.factors(rescale.norms, 0)[None, :]  # (1, columns)
    if rescale.rule == "lycoris":
        return total.mul_(1 + rescale.strength * (factors - 1)).sub_(base)
    if alone:
        return total.mul_(factors).sub_(base).mul_(rescale.strength)
    return before + total.mul_(factors).sub_(base + before).mul_(rescale.strength)

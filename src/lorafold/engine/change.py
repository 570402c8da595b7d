"""What a step does to the tensor that it starts from: takes something out, adds updates, and with DoRA rescales the sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..kernel.elementwise import ElementwiseSum
from ..kernel.factors import Factors, stack
from ..kernel.merge import merge_weight
from ..kernel.rotate import RotatedWeight
from ..kernel.rotations import RowRotation
from ..kernel.stages import Stage
from ..kernel.update import LowRankUpdate
from .threads import Once


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
class Change:
    """The updates that are added to a matrix, what is done to the sum, and rows put in last; all are the whole matrix's.

    - `pieces`: in order, and together the whole matrix
    - `stages`: the same updates in the order in which they count, where one of them rescales; then there is one piece
    - `first`: what is added before all else, and the sum rounded to the matrix's own dtype: the residual that an adapter was
      trained on
    - `rotation`: what is done to its rows in place of all else, and `whole`: what that makes of all of them
    - `elements`: what is added in place of updates, where some of it is LoHa or LoKr
    """

    pieces: tuple[Piece, ...]
    stages: tuple[Stage, ...] = ()
    rows: NewValues | None = None
    first: LowRankUpdate | None = None
    rotation: RowRotation | None = None
    whole: Once[RotatedWeight] | None = None
    elements: ElementwiseSum | None = None

    @property
    def adds(self) -> bool:
        """Whether anything is added."""
        made = self.rotation is not None or self.elements is not None or bool(self.stages)
        return made or any(piece.updates for piece in self.pieces)

    def streams(self, count: int) -> bool:
        """Whether rows of the base are all that it takes, as they are, and blocks of `count` rows can be done by themselves.

        Of what rotates that takes no more than twice the rows.
        """
        parted = any(stage.rows is not None for stage in self.stages)
        if self.rotation is not None and self.rotation.group > min(count, self.rotation.rows) // (
            2 if count < self.rotation.rows else 1
        ):
            return False
        return self.rows is None and self.first is None and not parted

    def staged(self, start: int, stop: int) -> Iterator[tuple[tuple[Stage, ...], int, int, int]]:
        """The stages for rows `start` to `stop`, from which row on, to which, and which row of theirs that is."""
        if all(stage.rows is None for stage in self.stages):
            yield self.stages, start, stop, start
            return
        edges = {edge for stage in self.stages for edge in stage.rows or () if start < edge < stop}
        for low, high in pairwise([start, *sorted(edges), stop]):
            here = [stage for stage in self.stages if stage.rows is None or stage.rows[0] <= low < stage.rows[1]]
            yield tuple(stage.narrow(low, high - low) for stage in here), low, high, 0

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

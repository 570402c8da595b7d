"""Codes less the zero point of their block: the code, not always a whole number, that stands for zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...files.expression import Matrix
from .codebook import Constant
from .scaled import BlockScaled


@dataclass(frozen=True)
class BlockShifted(BlockScaled):
    """The numbers of `codes`, each less the zero point of its block; these stand where a `BlockScaled` has its scales."""

    def value(self, *parts: Tensor) -> Tensor:
        return parts[0].double() - self.spread(parts[1].double())


def shifted(codes: Matrix, zero: float) -> BlockShifted:
    """`codes` less `zero`, all of them."""
    return BlockShifted(codes, Constant((zero,), (1,) * len(codes.shape)), codes.shape)

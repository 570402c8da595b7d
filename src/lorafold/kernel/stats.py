"""How much of an update survived the rounding: kept = ⟨W′ − W, ΔW⟩ / ⟨ΔW, ΔW⟩."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """The two inner products of kept, which add up over tensors.

    - `dot`: ⟨W′ − W, ΔW⟩
    - `square`: ⟨ΔW, ΔW⟩
    - `clamped`: how many sums were beyond the dtype's largest number, and were put to it

    A share of 1 says that the merged weight moved by the update; 0, that rounding gave the base back.

    >>> (Kept(0.5, 1.0) + Kept(1.0, 1.0)).share
    0.75
    """

    dot: float = 0.0
    square: float = 0.0
    clamped: int = 0

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Kept:
        """The one whose `numbers` these are."""
        dot, square, *clamped = numbers
        return cls(dot, square, int(sum(clamped)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """All that it holds, for a file."""
        return self.dot, self.square, self.clamped

    @property
    def share(self) -> float:
        """kept; 1.0 for an update that is zero, since nothing of it was lost."""
        return self.dot / self.square if self.square > 0 else 1.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(self.dot + other.dot, self.square + other.square, self.clamped + other.clamped)

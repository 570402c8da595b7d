"""The updates of one merge as two matrices: their sum is one update whose rank is the sum of the ranks.

What a merge derives from them (norms, bounds, factors widened and packed) is made when first asked for and kept with them, so that
a weight that is merged a block of rows at a time pays for it once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from .undo.bits import checksum
from .update import LowRankUpdate, joint_dtype

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = Σ_k scaling_k · B[:, k] · A[k, :] over the R columns of all updates.

    - `given_B`: (out, R), `given_A`: (R, in), as given, in a dtype that holds them: scaling is not in them
    - `scalings`: of the updates in turn, each with its rank
    """

    given_B: Tensor
    given_A: Tensor
    scalings: tuple[tuple[float, int], ...]
    _derived: dict[Hashable, object] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def once(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What `make` makes, the first time; the same again for the same `key`. Threads that come meanwhile wait for it."""
        if key not in self._derived:
            with self._lock:
                if key not in self._derived:
                    self._derived[key] = make()
        return cast(Derived, self._derived[key])

    @property
    def scaling(self) -> Tensor:
        """(R,) float64."""
        return self.once("scaling", self._scaling)

    def _scaling(self) -> Tensor:
        parts = [torch.full((r,), scaling, dtype=torch.float64, device=self.given_A.device) for scaling, r in self.scalings]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @property
    def uniform(self) -> float | None:
        """The scaling of all columns, if they have but one, and it is not zero."""
        first = self.scalings[0][0]
        return first if first != 0 and all(scaling == first for scaling, _ in self.scalings) else None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.given_B.shape[0], self.given_A.shape[1]

    @property
    def r(self) -> int:
        return self.given_A.shape[0]

    def scaled_B(self, dtype: torch.dtype) -> Tensor:  # noqa: N802 - B is the field's name
        """(out, R) in `dtype`: scaling multiplied in, in float64, then rounded to `dtype`."""
        wide = self.once("scaled_B", lambda: self.given_B.double() * self.scaling)
        return self.once(("scaled_B", dtype), lambda: wide.to(dtype))

    def wide_A(self, dtype: torch.dtype) -> Tensor:  # noqa: N802
        """(R, in) in `dtype`: rounded to it."""
        return self.once(("wide_A", dtype), lambda: self.given_A.to(dtype))

    def norms(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(out,) and (in,) float64: the square roots of Σ_k w_k (scaling_k B_ik)² and Σ_k w_k A_kj², with the (R,) `weights` w; by
        Cauchy and Schwarz Σ_k w_k |scaling_k B_ik A_kj| is at most their product."""
        room = 1 + 2.0**-40  # for the rounding of the norms themselves
        rows, columns = self.scaled_B(torch.float64).square() @ weights, weights @ self.given_A.double().square()
        return rows.sqrt_() * room, columns.sqrt_() * room

    @property
    def T(self) -> Factors:  # noqa: N802
        """The factors of the transpose of ΔW; scaling stays beside them."""
        return Factors(self.given_A.T, self.given_B.T, self.scalings)

    def rows(self, rows: slice) -> Factors:
        """The factors of rows `rows` of ΔW, as views."""
        return Factors(self.given_B[rows], self.given_A, self.scalings)


def stack(updates: Sequence[LowRankUpdate]) -> Factors:
    """`updates` side by side, in an order that does not depend on the order given."""
    ordered = _in_order(updates) if len(updates) > 1 else updates
    return Factors(
        _joined([update.lora_B for update in ordered], dim=1),
        _joined([update.lora_A for update in ordered], dim=0),
        tuple((update.scaling, update.r) for update in ordered),
    )


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """In one tensor, of a dtype that holds all of them."""
    wide = joint_dtype(part.dtype for part in parts)
    return torch.cat([part.to(wide) for part in parts], dim) if len(parts) > 1 else parts[0]


def _in_order(updates: Sequence[LowRankUpdate]) -> list[LowRankUpdate]:
    """`updates` by their content; those that their sums do not tell apart, by all their bits."""
    keys = [_canonical(update) for update in updates]
    once = len(set(keys)) == len(keys)
    keyed = [
        (key, () if once else (*(checksum(factor.resolve_neg()) for factor in (u.lora_A, u.lora_B)),), u)
        for key, u in zip(keys, updates, strict=True)
    ]
    return [update for _, _, update in sorted(keyed, key=lambda each: each[:2])]


def _canonical(update: LowRankUpdate) -> tuple[float, ...]:
    """A key by content, which has an order: a NaN counts as less than any number."""
    a, b = update.lora_A.double(), update.lora_B.double()
    sums = (float(a.sum()), float(b.sum()), float(a.abs().sum()), float(b.abs().sum()))
    return (update.scaling, update.r, *(-math.inf if math.isnan(x) else x for x in sums))

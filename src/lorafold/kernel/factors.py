"""The updates of one merge as two matrices: their sum is one update whose rank is the sum of the ranks.

What a merge derives from them (norms, bounds, factors widened and packed) is made when first asked for and kept with them, so that
a weight that is merged a block of rows at a time pays for it once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..update import LowRankUpdate

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class Factors:
    """ΔW = Σ_k scaling_k · B[:, k] · A[k, :] over the R columns of all updates.

    - `lora_B`: (out, R) float64, as given: scaling is not in it
    - `lora_A`: (R, in) float64, as given
    - `scaling`: (R,) float64
    """

    lora_B: Tensor
    lora_A: Tensor
    scaling: Tensor
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
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def r(self) -> int:
        return self.scaling.numel()

    def scaled_B(self, dtype: torch.dtype) -> Tensor:  # noqa: N802 - B is the field's name
        """(out, R) in `dtype`: scaling multiplied in, in float64, then rounded to `dtype`."""
        wide = self.once("scaled_B", lambda: self.lora_B * self.scaling)
        return self.once(("scaled_B", dtype), lambda: wide.to(dtype))

    def wide_A(self, dtype: torch.dtype) -> Tensor:  # noqa: N802
        """(R, in) in `dtype`: rounded to it."""
        return self.once(("wide_A", dtype), lambda: self.lora_A.to(dtype))

    def norms(self) -> tuple[Tensor, Tensor]:
        """(out,) ‖(sB)_i‖ and (in,) ‖A_j‖, float64: by Cauchy and Schwarz Σ_k |scaling_k B_ik A_kj| is at most their product."""
        room = 1 + 2.0**-40  # for the rounding of the norms themselves
        rows = torch.linalg.vector_norm(self.scaled_B(torch.float64), dim=1)
        return rows * room, (self.lora_A * self.lora_A).sum(dim=0).sqrt() * room

    @property
    def T(self) -> Factors:  # noqa: N802
        """The factors of the transpose of ΔW; scaling stays beside them."""
        return Factors(self.lora_A.T.contiguous(), self.lora_B.T.contiguous(), self.scaling)

    def rows(self, rows: slice) -> Factors:
        """The factors of rows `rows` of ΔW, as views, with nothing derived yet."""
        return Factors(self.lora_B[rows], self.lora_A, self.scaling)


def stack(updates: Sequence[LowRankUpdate]) -> Factors:
    """`updates` side by side, in an order that does not depend on the order given.

    Widening to float64 is exact for every dtype that an adapter comes in.
    """
    ordered = sorted(updates, key=_canonical) if len(updates) > 1 else updates
    first = ordered[0]
    return Factors(
        _joined([update.lora_B.double() for update in ordered], dim=1),
        _joined([update.lora_A.double() for update in ordered], dim=0),
        torch.cat([torch.full((update.r,), update.scaling, dtype=torch.float64, device=first.lora_A.device) for update in ordered]),
    )


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return (torch.cat(parts, dim) if len(parts) > 1 else parts[0]).contiguous()


def _canonical(update: LowRankUpdate) -> tuple[float, ...]:
    """A key by content; updates with equal keys are the same for all that summing them can show."""
    a, b = update.lora_A.double(), update.lora_B.double()
    return (update.scaling, update.r, float(a.sum()), float(b.sum()), float(a.abs().sum()), float(b.abs().sum()))

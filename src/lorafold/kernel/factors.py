"""The updates of one merge as two matrices: their sum is one update whose rank is the sum of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..update import LowRankUpdate


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

    @property
    def r(self) -> int:
        return self.scaling.numel()

    def scaled_B(self, dtype: torch.dtype) -> Tensor:  # noqa: N802 - B is the field's name
        """(out, R) in `dtype`: scaling multiplied in, in float64, then rounded to `dtype`."""
        return (self.lora_B * self.scaling).to(dtype)

    def norms(self) -> tuple[Tensor, Tensor]:
        """(out,) ‖(sB)_i‖ and (in,) ‖A_j‖, float64: by Cauchy and Schwarz Σ_k |scaling_k B_ik A_kj| is at most their product."""
        room = 1 + 2.0**-40  # for the rounding of the norms themselves
        rows = torch.linalg.vector_norm(self.lora_B * self.scaling, dim=1)
        return rows * room, torch.linalg.vector_norm(self.lora_A, dim=0) * room

    def rows(self, rows: slice) -> Factors:
        """The factors of rows `rows` of ΔW, as views."""
        return Factors(self.lora_B[rows], self.lora_A, self.scaling)


def stack(updates: Sequence[LowRankUpdate]) -> Factors:
    """`updates` side by side, in an order that does not depend on the order given.

    Widening to float64 is exact for every dtype that an adapter comes in.
    """
    ordered = sorted(updates, key=_canonical) if len(updates) > 1 else updates
    first = ordered[0]
    return Factors(
        torch.cat([update.lora_B.double() for update in ordered], dim=1),
        torch.cat([update.lora_A.double() for update in ordered], dim=0).contiguous(),
        torch.cat([torch.full((update.r,), update.scaling, dtype=torch.float64, device=first.lora_A.device) for update in ordered]),
    )


def _canonical(update: LowRankUpdate) -> tuple[float, ...]:
    """A key by content; updates with equal keys are the same for all that summing them can show."""
    a, b = update.lora_A.double(), update.lora_B.double()
    return (update.scaling, update.r, float(a.sum()), float(b.sum()), float(a.abs().sum()), float(b.abs().sum()))

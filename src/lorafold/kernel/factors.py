"""The updates of one merge as two matrices: their sum is one update whose rank is the sum of the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
        return self._scaled_B.to(dtype)

    @cached_property
    def _scaled_B(self) -> Tensor:  # noqa: N802
        return self.lora_B * self.scaling

    def norms(self) -> tuple[Tensor, Tensor]:
        """(out,) ‖(sB)_i‖ and (in,) ‖A_j‖, float64: by Cauchy and Schwarz Σ_k |scaling_k B_ik A_kj| is at most their product."""
        room = 1 + 2.0**-40  # for the rounding of the norms themselves
        rows = torch.linalg.vector_norm(self._scaled_B, dim=1)
        return rows * room, torch.linalg.vector_norm(self.lora_A, dim=0) * room

    @property
    def T(self) -> Factors:  # noqa: N802
        """The factors of the transpose of ΔW; scaling stays beside them."""
        return Factors(self.lora_A.T.contiguous(), self.lora_B.T.contiguous(), self.scaling)

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

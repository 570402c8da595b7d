"""Updates of which some rescale what there is: what `rescale` makes weights of, as values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from .factors import Factors, stack
from .update import LowRankUpdate

EPS = torch.finfo(torch.float32).eps
"""LyCORIS trains in float32, and adds that type's step at 1 to the length."""


@dataclass(frozen=True, eq=False)
class Rescale:
    """Each output's weights are brought to a trained length.

    DoRA, arXiv:2402.09353, equation 5: W′ = (1 − strength) · W + strength · m / ‖W + ΔW‖ · (W + ΔW), the length over the weights of
    one output. LyCORIS adds `EPS` to it, and counts the strength from the sum (`lycoris/functional/general.py`,
    `weight_decompose`): W′ = (1 + strength · (m / ‖W + ΔW‖ − 1)) · (W + ΔW).

    - `magnitude`: m, (outputs,) float64
    - `lengths`: ‖W + ΔW‖ of each output, (outputs,) float64, where an output is a column of the matrix; None where it is a row
    - `rule`: ``"peft"`` or ``"lycoris"``
    """

    magnitude: Tensor
    strength: float = 1.0
    lengths: Tensor | None = None
    rule: Literal["peft", "lycoris"] = "peft"

    @property
    def eps(self) -> float:
        """What is added to a length."""
        return EPS if self.rule == "lycoris" else 0.0

    @property
    def keep(self) -> float:
        """What W is multiplied by."""
        return 0.0 if self.rule == "lycoris" else 1.0 - self.strength

    def factors(self, lengths: Tensor, first: int = 0) -> Tensor:
        """What W + ΔW is multiplied by, of the outputs from number `first` on, whose `lengths` are given."""
        with torch.no_grad(), subnormal_numbers(), one_thread():
            found = self.magnitude[first : first + lengths.shape[0]] / (lengths + self.eps)
            if self.rule == "peft":
                return found.mul_(self.strength)
            return found.sub_(1).mul_(self.strength).add_(1)

    @cached_property
    def of_columns(self) -> Tensor | None:
        """The factors of columns; None where an output is a row."""
        return None if self.lengths is None else self.factors(self.lengths)

    @property
    def of_rows(self) -> None:
        """The factors of rows: they depend on the sums."""


@dataclass(frozen=True, eq=False)
class Multiply:
    """Rows, or columns, are multiplied by the numbers `by`, float64, one for each: IA³."""

    by: Tensor
    columns: bool = False
    keep: float = 0.0

    @property
    def of_rows(self) -> Tensor | None:
        """The factors of rows; None where it is columns."""
        return None if self.columns else self.by

    @property
    def of_columns(self) -> Tensor | None:
        """The factors of columns; None where it is rows."""
        return self.by if self.columns else None


@dataclass(frozen=True, eq=False)
class Stage:
    """One of several updates that do not commute: it is added, and then rescales what there is, if it does.

    - `rows`: which rows (start, stop) of the matrix it is for, and rescales; None for all of them
    - `inner`: (columns, r), of GLoRA, whose lora_B is W @ `inner`, and that of `update` stands for nothing but its shape; or None
    """

    update: LowRankUpdate
    rescale: Rescale | Multiply | None = None
    rows: tuple[int, int] | None = None
    inner: Tensor | None = None

    def narrow(self, start: int, count: int) -> Stage:
        """What it does to `count` rows of the matrix from `start` on, as a stage of just these."""
        start -= 0 if self.rows is None else self.rows[0]
        rescale = self.rescale
        if isinstance(rescale, Multiply):
            rescale = rescale if rescale.columns else replace(rescale, by=rescale.by[start : start + count])
        elif isinstance(rescale, Rescale) and rescale.lengths is None:
            rescale = replace(rescale, magnitude=rescale.magnitude[start : start + count])
        return Stage(self.update.narrow(0, start, count), rescale, inner=self.inner)

    @cached_property
    def factors(self) -> Factors:
        """The update's, with which stays what is derived from them."""
        return stack([self.update])

"""LoHa and LoKr: updates whose elements are products, W + Σ scaling · P ∘ Q.

P and Q are products of matrices, or matrices as they are stored: of LoHa (FedPara, arXiv:2108.06098) both are (out, in), of LoKr
(arXiv:2309.14859) ΔW = P ⊗ Q. The rank of ΔW is high, r² for LoHa, and no factors of that rank are made here.

What `exact` means for them is what it means for all sums: the real number W_ij + Σ scaling · P · Q, with P_ij = Σ_k B_ik A_kj and
Q likewise, of the factors as they are read, correctly rounded once. Only what a core tensor makes of a factor (LyCORIS's
`use_tucker`) is rounded before, to float64: its products are added one after another (`files/products.py`), and what comes of it is
a factor.

How it is known that a sum in float64 is rounded right, as in exact.py: let u be 2⁻⁵³, p_i and p′_j the norms of the rows of B and
of the columns of A, or of a stored matrix the largest number of its row, and 1; q_i and q′_j those of Q. Then

    |P̂_ij − P_ij| ≤ γ_{r+1} p_i p′_j,    |fl(fl(s P̂) Q̂) − s P Q| ≤ γ_{r + r′ + 4} |s| p_i q_i · p′_j q′_j

since |P_ij| ≤ p_i p′_j (Cauchy and Schwarz), and so for Q. Several terms are bounded together, Σ a_n b_n ≤ √(Σ a_n²) · √(Σ b_n²),
and each goes through as many additions as there are terms. W is added, and both ends rounded: another 4 u |x|. Elements whose ends
differ are summed without rounding error. Where sums are kept as two numbers, for a result in float64, what they lack is of the
order u²: (r + r′ + 12 + the number of terms)² of it. `cpu/elementwise.h` does the same; `fast` is the same sum, rounded without a
look.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from ..arithmetic import one_thread, subnormal_numbers
from ..errors import UpdateError
from .exact import SLACK, UNIT
from .update import LowRankUpdate, is_finite_number, shown

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class Multiplicand:
    """P = B A, or a matrix as it is.

    - `lora_A`: (r, columns), or the matrix (rows, columns); `lora_B`: (rows, r), or None; floating point
    """

    lora_A: Tensor
    lora_B: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of P."""
        return (self.lora_A if self.lora_B is None else self.lora_B).shape[0], self.lora_A.shape[1]

    @property
    def T(self) -> Multiplicand:  # noqa: N802 - as on a tensor
        """That of the transpose."""
        return Multiplicand(self.lora_A.T) if self.lora_B is None else Multiplicand(self.lora_B.T, self.lora_A.T)

    @property
    def r(self) -> int:
        """Products that each number is a sum of; 0 of a matrix as it is."""
        return 0 if self.lora_B is None else self.lora_A.shape[0]

    def norms(self) -> tuple[Tensor, Tensor]:
        """(rows,) and (columns,) float64, whose products bound |P|, or the sum of the products' sizes; zero where P is."""
        A = self.lora_A.double()
        if self.lora_B is None:
            return _room(A.abs().amax(1), (A != 0).any(1)), torch.ones_like(A[0])
        B = self.lora_B.double()
        return _room(B.square().sum(1).sqrt_(), (B != 0).any(1)), _room(A.square().sum(0).sqrt_(), (A != 0).any(0))


_LARGEST = 2.0**200
_ROOM = 2.0**-200
"""What is added to a norm for what underflow takes from squares and products."""


def _room(norms: Tensor, something: Tensor) -> Tensor:
    return torch.where(something, norms * (1 + 2.0**-40) + _ROOM, 0.0)


@dataclass(frozen=True, eq=False)
class ElementwiseUpdate:
    """ΔW = scaling · P ∘ Q, or with `kronecker` scaling · P ⊗ Q; `other` is Q, or None where ΔW = scaling · P.

    Raises `UpdateError` where the shapes do not fit.

    >>> ones = Multiplicand(torch.ones(1, 2), torch.ones(3, 1))
    >>> ElementwiseUpdate(ones, ones, 0.5, kronecker=True).shape
    (9, 4)
    """

    one: Multiplicand
    other: Multiplicand | None
    scaling: float
    kronecker: bool = False

    def __post_init__(self) -> None:
        if not self.kronecker and self.other is not None and self.one.shape != self.other.shape:
            raise UpdateError(f"the factors of an update are {self.one.shape} and {self.other.shape}: they must be of one shape")
        if not is_finite_number(self.scaling):
            raise UpdateError(f"scaling must be a finite number, not {shown(self.scaling)}", hint="of a tensor, pass tensor.item()")

    @classmethod
    def of(cls, update: LowRankUpdate) -> ElementwiseUpdate:
        """A plain one."""
        return cls(Multiplicand(update.lora_A, update.lora_B), None, update.scaling)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of ΔW."""
        (rows, columns), (c, d) = self.one.shape, self.repeats
        return rows * c, columns * d

    @property
    def repeats(self) -> tuple[int, int]:
        """How often each row and each column of P stands one after another."""
        return self.other.shape if self.kronecker and self.other is not None else (1, 1)

    @property
    def sides(self) -> tuple[Multiplicand, ...]:
        """P, and Q where there is one."""
        return (self.one,) if self.other is None else (self.one, self.other)

    @property
    def T(self) -> ElementwiseUpdate:  # noqa: N802 - as on a tensor
        """The update ΔWᵀ."""
        return replace(self, one=self.one.T, other=None if self.other is None else self.other.T)

    def rows(self, which: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which rows of P, and of Q, the rows `which` are made of."""
        if not self.kronecker or self.other is None:
            return which, None if self.other is None else which
        return which // self.other.shape[0], which % self.other.shape[0]

    def columns(self) -> tuple[Tensor, Tensor | None]:
        """The same of all columns."""
        return self.T.rows(torch.arange(self.shape[1], device="cpu"))


@dataclass(frozen=True, eq=False)
class ElementwiseSum:
    """Σ of such updates of one matrix; what is derived from them stays with them."""

    updates: tuple[ElementwiseUpdate, ...]
    _derived: dict[Hashable, object] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """What `make` makes, the first time; threads that come at once may each make it."""
        if key not in self._derived:
            self._derived[key] = make()
        return cast(Derived, self._derived[key])

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of ΔW."""
        return self.updates[0].shape

    @property
    def bound(self) -> ElementwiseBound:
        """That of sums in float64."""
        return self.once("bound", lambda: _bound(self.updates))


@dataclass(frozen=True, eq=False)
class ElementwiseBound:
    """|error of ΔW_ij| ≤ rows_i · columns_j, in float64; not `safe` where numbers on the way might over- or underflow.

    - `share`: what this is multiplied by where sums are kept as two numbers
    """

    rows: Tensor  # (out,)
    columns: Tensor  # (in,)
    safe: bool
    share: float


def _bound(updates: Sequence[ElementwiseUpdate]) -> ElementwiseBound:
    rows: Tensor | None = None
    columns: Tensor | None = None
    safe, share = True, 0.0
    with torch.no_grad(), subnormal_numbers(), one_thread():
        for update in updates:
            of_rows, of_columns = (torch.ones(size, dtype=torch.float64, device="cpu") for size in update.shape)
            places = zip(update.rows(torch.arange(update.shape[0], device="cpu")), update.columns(), strict=True)
            for side, (row, column) in zip(update.sides, places, strict=False):
                p, q = side.norms()
                safe &= float(p.max()) < _LARGEST and float(q.max()) < _LARGEST
                of_rows *= p[row]
                of_columns *= q[column]
            s, count = abs(update.scaling), float(sum(side.r for side in update.sides) + 4 + len(updates))
            safe &= s == 0 or 1 / _LARGEST < s < _LARGEST
            share = max(share, (count + 8) ** 2 / count * UNIT[torch.float64])
            of_rows *= s * count * UNIT[torch.float64] * SLACK
            rows = of_rows if rows is None else torch.hypot(rows, of_rows)
            columns = of_columns if columns is None else torch.hypot(columns, of_columns)
    if rows is None or columns is None:
        raise UpdateError("a sum of no updates")
    return ElementwiseBound(rows * SLACK, columns * SLACK, safe, share)

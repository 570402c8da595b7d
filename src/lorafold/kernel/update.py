"""What an adapter adds to a weight: ΔW = scaling · lora_B @ lora_A, as a value.

A `LowRankUpdate` is closed under what fused projections, transposed layers, shards and sums of adapters need, so none of them has
code of its own. Nothing here touches a weight: that is `lorafold.kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Real

import torch
from torch import Tensor

from ..arithmetic import subnormal_numbers
from ..errors import UpdateError


def scaling_factor(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """The factor of an update: ``lora_alpha / r``, or with rank stabilisation ``lora_alpha / sqrt(r)``.

    LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732, theorem 3.2.

    Raises `UpdateError` where `r` is not positive or `lora_alpha` is not finite.

    >>> scaling_factor(8, 16), scaling_factor(16, 8, use_rslora=True)
    (2.0, 2.0)
    """
    if not is_finite_number(r) or r <= 0 or r != int(r):
        raise UpdateError(f"r must be a positive integer, not {shown(r)}")
    if not is_finite_number(lora_alpha):
        raise UpdateError(f"lora_alpha must be a finite number, not {shown(lora_alpha)}")
    if type(use_rslora) not in (bool, int):
        raise UpdateError(f"use_rslora must be True or False, not {shown(use_rslora)}")
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def shown(x: object) -> str:
    """A word for `x` in an error: of a plain value its text, of anything else its type, which always can be said.

    >>> shown(0.5), shown("up"), shown(torch.ones(2))
    ('0.5', "'up'", 'a Tensor')
    """
    return repr(x) if isinstance(x, str | int | float | None | torch.dtype) else f"a {type(x).__name__}"


def is_finite_number(x: object) -> bool:
    """Whether `x` is a real number that float64 has room for, and no bool.

    >>> [is_finite_number(x) for x in (2, 0.5, True, float("nan"), 10**400, "2", None)]
    [True, True, False, False, False, False, False]
    """
    if isinstance(x, bool) or not isinstance(x, Real):
        return False
    try:
        return math.isfinite(x)
    except OverflowError:
        return False


def _is_integer(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


_NO_NUMBERS = {dtype for dtype in (getattr(torch, "float4_e2m1fn_x2", None),) if dtype is not None}
"""Floating dtypes whose elements are several numbers each."""


def joint_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype that holds the numbers of all `dtypes`, one or more; where floats of eight bits are among others, float32 at least.

    >>> joint_dtype([torch.float8_e4m3fn, torch.bfloat16]), joint_dtype([torch.float16, torch.bfloat16])
    (torch.float32, torch.float32)
    """
    known = set(dtypes)
    if len(known) == 1:
        return known.pop()
    return reduce(torch.promote_types, (torch.float32 if dtype.itemsize == 1 else dtype for dtype in known))


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """ΔW = scaling · lora_B @ lora_A, kept as its factors.

    - `lora_A`: (r, in_features), floating point
    - `lora_B`: (out_features, r), floating point; the dtypes of A and B may differ
    - `scaling`: the factor, a finite float

    Raises `UpdateError` where the shapes or dtypes do not fit.

    >>> u = LowRankUpdate(torch.ones(1, 3), torch.tensor([[1.0], [2.0]]), scaling=0.5)
    >>> u.dense(torch.float32)
    tensor([[0.5000, 0.5000, 0.5000],
            [1.0000, 1.0000, 1.0000]])
    >>> u.T.shape, u.narrow(0, 1, 1).dense(torch.float32)
    ((3, 2), tensor([[1., 1., 1.]]))
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    def __post_init__(self) -> None:
        a, b = self.lora_A, self.lora_B
        for name, factor in (("lora_A", a), ("lora_B", b)):
            if not isinstance(factor, Tensor):
                raise UpdateError(f"{name} must be a torch.Tensor, not {type(factor).__name__}")
            if factor.layout != torch.strided:
                raise UpdateError(f"{name} must be dense, not of layout {factor.layout}", hint="convert it with to_dense()")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise UpdateError(
                f"lora_A must be (r, in_features) and lora_B (out_features, r); found {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.shape[0] == 0:
            raise UpdateError("lora_A and lora_B have a rank of 0: there is nothing to add")
        if not (a.is_floating_point() and b.is_floating_point()) or _NO_NUMBERS & {a.dtype, b.dtype}:
            raise UpdateError(f"lora_A and lora_B must be floating point; found {a.dtype} and {b.dtype}")
        if not is_finite_number(self.scaling):
            raise UpdateError(f"scaling must be a finite number, not {shown(self.scaling)}", hint="of a tensor, pass tensor.item()")

    @property
    def r(self) -> int:
        """The rank that the factors have room for."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of ΔW."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def T(self) -> LowRankUpdate:  # noqa: N802 - as on a tensor
        """The update ΔWᵀ, of shape (in_features, out_features)."""
        return LowRankUpdate(self.lora_B.T, self.lora_A.T, self.scaling)

    def scaled(self, factor: float) -> LowRankUpdate:
        """The update `factor` · ΔW; the factors A and B are shared.

        Raises `UpdateError` where `factor`, or the new scaling, is no finite number.
        """
        if not is_finite_number(factor):
            raise UpdateError(f"the factor of an update must be a finite number, not {shown(factor)}")
        return replace(self, scaling=self.scaling * factor)

    def narrow(self, dim: int, start: int, length: int) -> LowRankUpdate:
        """Rows (`dim` 0) or columns (`dim` 1) `start` to `start + length` of ΔW, as views of B or of A.

        Raises `UpdateError` where there are no such.
        """
        if dim not in (0, 1) or not (
            _is_integer(start) and _is_integer(length) and 0 <= start <= start + length <= self.shape[dim]
        ):
            raise UpdateError(
                f"an update of shape {self.shape} has no {shown(length)} from {shown(start)} on in dimension {shown(dim)}"
            )
        if dim == 0:
            return replace(self, lora_B=self.lora_B.narrow(0, start, length))
        return replace(self, lora_A=self.lora_A.narrow(1, start, length))

    def cat(self, *others: LowRankUpdate) -> LowRankUpdate:
        """The sum of this update and `others` as one update of rank r1 + r2 + …

        Exact where the scalings agree: the factors are put side by side. Where they differ, each scaling is multiplied into its
        lora_B in float64, which is exact for scalings of up to 29 significant bits and float32 factors, and otherwise rounded to
        float64.

        Raises `UpdateError` where the shapes differ.

        >>> one = LowRankUpdate(torch.eye(2), torch.eye(2), 1.0)
        >>> one.cat(one.scaled(3.0)).dense(torch.float32)
        tensor([[4., 0.],
                [0., 4.]])
        """
        parts = [self, *others]
        if not all(isinstance(part, LowRankUpdate) for part in parts):
            raise UpdateError(f"only updates can be added to an update; found {[type(part).__name__ for part in parts]}")
        if len({part.shape for part in parts}) > 1:
            raise UpdateError(f"updates of different shapes cannot be added: {[part.shape for part in parts]}")
        scaling = self.scaling
        if any(part.scaling != scaling for part in parts):
            with subnormal_numbers(workers=True):
                parts = [LowRankUpdate(part.lora_A, part.lora_B.double() * part.scaling, 1.0) for part in parts]
            scaling = 1.0
        wide_A = joint_dtype(part.lora_A.dtype for part in parts)
        wide_B = joint_dtype(part.lora_B.dtype for part in parts)
        return LowRankUpdate(
            torch.cat([part.lora_A.to(wide_A) for part in parts], dim=0),
            torch.cat([part.lora_B.to(wide_B) for part in parts], dim=1),
            scaling,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """ΔW itself, (out_features, in_features), computed in float64 and cast to `dtype`. For looking at, not for merging.

        Raises `UpdateError` where `dtype` is not a floating one.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UpdateError(f"dtype must be a floating torch.dtype, not {shown(dtype)}")
        with subnormal_numbers(workers=True):
            delta: Tensor = self.lora_B.double() @ self.lora_A.double()
            return delta.mul_(self.scaling).to(dtype)

"""The correctly rounded sum, at little more than the price of a wide one.

The idea: compute W + ΔW in a wide dtype, with a bound e on its error, and round x − e and x + e. Where both give the same number,
rounding is monotone, so the real sum, which lies between, gives it too. The few elements where they differ are done again, one by
one, in float64 with a bound of their own; the very few that are left, in sums without error (`errorfree`).

Bounds (u: unit roundoff of the wide dtype; γ_n ≈ n·u; Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
A product s·B_ik·A_kj takes part in: the rounding of s·B in float64, of s·B and of A to wide, the product, and at most R − 1
additions, in whatever order. So |Δ̂ − Δ| ≤ γ_{R+4} · Σ_k |s B_ik A_kj|. Adding W costs u·|x|, the ends x ∓ e another
u·(|x| + e); what scales with e is covered by `SLACK`, and a third u·|x| is to spare.

From a wide float64 torch rounds to a half by way of float32. That is harmless as long as e is more than a step of float32, which is
at most 2⁻²³·|x|, or 2⁻¹⁴⁹ where x is subnormal: then no tie of the half can hide between both ends. float16 has no such x.

A result in float64 has no wider dtype to be computed in: `doubled` carries what float64 loses.

`native` does it in compiled code where it can. It knows its order of summing, and counts the roundings that each product goes
through: m_k of them make an error of at most u · Σ_k m_k |s B_ik A_kj|. It does sums without error itself, and leaves to `settle`
what underflow might spoil in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .doubled import doubled_sums
from .errorfree import exact_sums
from .factors import Factors
from .rounding import HALVES, to_nearest, to_odd
from .torch_tiles import Scratch

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
TINY = {torch.float32: 2.0**-125, torch.float64: 2.0**-1000}  # above what underflow can take from a product
_LARGEST = {torch.float32: 2.0**126, torch.float64: 2.0**1000}
_FLOAT32_STEP = 2.0**-149  # between subnormal numbers of float32, and so in the range of bfloat16
_SMALLEST_NORM = 2.0**-500  # the square of what is smaller may underflow
SLACK = 1 + 2.0**-10
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHERED = 1 << 20  # float64 numbers gathered at once for elements that are done one by one
_HIGH_RANK = 32  # from here on float32 bounds leave so many elements undecided that float64 tiles are cheaper


def wide_dtype(target: torch.dtype, weight_dtype: torch.dtype, r: int) -> torch.dtype:
    """The dtype that tiles are accumulated in on the way to `target`."""
    halves = target in HALVES and weight_dtype != torch.float64
    return torch.float32 if halves and r < _HIGH_RANK else torch.float64


@dataclass(frozen=True, eq=False)
class Bound:
    """|error of ΔW_ij| ≤ rows_i · columns_j in the wide dtype; not `safe` where intermediate numbers might overflow it."""

    rows: Tensor  # (out,), zero where B is
    columns: Tensor  # (in,), zero where A is
    safe: bool


def error_bound(factors: Factors, wide: torch.dtype, norms: tuple[Tensor, Tensor] | None = None) -> Bound:
    """The bound for ΔW computed in `wide`, see the head of this file.

    - `norms`: (out,) and (in,), as of `Factors.norms`, weighted by how many roundings at most each product takes part in, one after
      another; by default by enough for any order of the sum
    """
    rows, columns = factors.norms(torch.full_like(factors.scaling, factors.r + 6)) if norms is None else norms
    largest = max(float(rows.max()), float(columns.max()))  # |scaling · B_ik| and |A_kj| are at most this
    safe = largest < _LARGEST[wide] and float(rows.max() * columns.max()) < _LARGEST[wide]
    # room² is more than underflow can take from R products; where a factor is zero there is nothing to take
    room = math.sqrt(factors.r * TINY[wide] * (1 + largest))
    rows = torch.where(_is_something(factors.given_B, rows, 1), rows * UNIT[wide] + room, 0.0)
    columns = torch.where(_is_something(factors.given_A, columns, 0), columns + room, 0.0)
    return Bound((rows * SLACK).to(wide), columns.to(wide), safe)


def _is_something(matrix: Tensor, norms: Tensor, dim: int) -> Tensor:
    """``(matrix != 0).any(dim)``, told from the norms where those are far from what underflow can hide."""
    if bool((norms > _SMALLEST_NORM).all()):
        return torch.ones_like(norms, dtype=torch.bool)
    return (matrix != 0).any(dim)


def relative_margin(wide: torch.dtype, target: torch.dtype) -> float:
    """The part of the margin that scales with the sum: e = relative_margin · |x| + rows_i · columns_j."""
    return max(3 * UNIT[wide], 2.0**-22 if wide == torch.float64 and target in HALVES else 0.0)


def exact_tile(base: Tensor, delta: Tensor, rows: slice, factors: Factors, scratch: Scratch, merged: Tensor) -> None:
    """Fill `merged` with round(W + ΔW), correctly rounded to its dtype, for rows `rows` of the weight.

    - `base`: (n, in), these rows of W, widened without loss
    - `delta`: (n, in), these rows of ΔW, as computed in the same wide dtype
    - `factors`: of all rows; `merged`: (n, in), contiguous
    """
    wide, target = base.dtype, merged.dtype
    block, bound = factors.rows(rows), factors.once(("bound", wide), partial(error_bound, factors, wide))
    if not bound.safe:
        everywhere = torch.arange(base.numel(), device=base.device)
        merged.view(-1).copy_(settle(everywhere, base.view(-1), base.shape[1], block, target)[0])
        return
    if target == torch.float64:
        undecided = doubled_sums(base, block, bound.rows[rows], bound.columns, merged)
        if undecided.numel():
            merged.view(-1)[undecided] = settle(undecided, base.view(-1)[undecided], base.shape[1], block, target)[0]
        return
    total = torch.add(base, delta, out=scratch.take(0, base))
    margin = torch.abs(total, out=scratch.take(1, base))
    torch.addr(margin, bound.rows[rows], bound.columns, beta=relative_margin(wide, target), out=margin)
    if wide == torch.float64 and target == torch.bfloat16:
        margin.add_(_FLOAT32_STEP)
    upper = scratch.narrow(merged)
    merged.copy_(torch.sub(total, margin, out=scratch.take(4, base)))
    upper.copy_(total.add_(margin))
    if bool(total.sum().isnan()):
        merged.masked_fill_(base.isnan(), torch.nan)  # torch's cast leaves bits that depend on the processor
    undecided = _differing(merged, upper)
    if undecided.numel():
        merged.view(-1)[undecided] = settle(undecided, base.view(-1)[undecided], base.shape[1], block, target)[0]


def _differing(a: Tensor, b: Tensor) -> Tensor:
    """(n,) flat indices at which the bits of `a` and `b` differ. `b` is used up."""
    integer = _INTEGERS[a.element_size()]
    difference = b.view(integer).bitwise_xor_(a.view(integer)).view(-1)
    each = 8 // difference.element_size()
    if difference.numel() % each:
        return difference.nonzero().squeeze(1)
    # words of eight bytes first: nearly all are zero, and looking at them is four times less work
    words = difference.view(torch.int64).nonzero()  # (n, 1)
    found = (words * each + torch.arange(each, device=words.device)).flatten()
    return found[difference[found] != 0]


def settle(places: Tensor, weight: Tensor, columns: int, factors: Factors, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """Elements of W + ΔW, each done alone: (n,) correctly rounded to `target`, and (n,) ΔW there, float64.

    - `places`: (n,) flat indices of a matrix with `columns` columns; `weight`: (n,) what W is there
    - `factors`: of that matrix
    """
    step = max(1, _GATHERED // factors.r)
    parts = [
        _settle(*chunk, columns, factors, target)
        for chunk in zip(torch.split(places, step), torch.split(weight, step), strict=True)
    ]
    merged, delta = zip(*parts, strict=True)
    return torch.cat(merged), torch.cat(delta)


def _settle(places: Tensor, weight: Tensor, columns: int, factors: Factors, target: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = weight.double()
    lora_B = factors.given_B[places // columns].double()  # (n, R)
    lora_A = factors.given_A.T[places % columns].double()  # (n, R)
    scaled_B = lora_B * factors.scaling
    products = scaled_B * lora_A
    delta = products.sum(dim=1)
    total = weight + delta
    if target != torch.float64:
        largest = 1 + scaled_B.abs().amax(dim=1) + lora_A.abs().amax(dim=1)
        tiny = factors.r * TINY[torch.float64] * largest * ((lora_B != 0) & (lora_A != 0)).any(dim=1)
        error = ((weight.abs() + products.abs().sum(dim=1)) * ((factors.r + 6) * UNIT[torch.float64]) + tiny) * SLACK
        merged = to_nearest(total - error, target)
        differ = merged.view(_INTEGERS[target.itemsize]) != to_nearest(total + error, target).view(_INTEGERS[target.itemsize])
        undecided = (differ | ~error.isfinite()).nonzero().squeeze(1)  # where float64 overflows, both ends may be one NaN
    else:
        merged, undecided = total, torch.arange(weight.numel(), device=weight.device)
    finite = weight.isfinite() & lora_B.isfinite().all(dim=1) & lora_A.isfinite().all(dim=1)
    # infinity and NaN have no error to be careful of, and finite products, however large, add nothing to them
    usual = lora_B.isfinite() & lora_A.isfinite()
    merged = torch.where(
        finite, merged, (weight + (lora_B * lora_A * factors.scaling).masked_fill(usual, 0.0).sum(dim=1)).to(target)
    )
    merged.masked_fill_(merged.isnan(), torch.nan)
    undecided = undecided[finite[undecided]]
    if undecided.numel():
        head, rest = exact_sums(weight[undecided], lora_B[undecided], lora_A[undecided], factors.scaling)
        merged[undecided] = head if target == torch.float64 else to_nearest(to_odd(head, rest), target)
    beyond = finite & ~delta.isfinite()
    return merged, torch.where(beyond, merged.double() - weight, delta) if bool(beyond.any()) else delta

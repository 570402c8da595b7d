"""Which number a format is given for a factor, and what of the factor goes into lora_B where that number cannot say it.

lora_B takes a factor exactly where it is a power of two, or has so few bits that the products are floats still. Otherwise the
products are rounded, which is refused unless it is allowed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from ...errors import UnsupportedAdapterError, printable
from .request import STORED, Update


def alpha_for(scaling: float, r: int, first: float) -> float | None:
    """A number that divided by `r` is `scaling`; `first` is tried first. None where no float is.

    >>> alpha_for(2.0, 8, 16.0), alpha_for(0.1, 3, 1.0)
    (16.0, None)
    """
    near = scaling * r
    for alpha in (first, near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)):
        if math.isfinite(alpha) and alpha / r == scaling:
            return alpha
    return None


def with_rank(update: Update, rank: int) -> Update:
    """`update` with factors of `rank`, filled up with zeros, which add nothing."""
    return replace(update, lora_A=_filled(update.lora_A, rank, 0), lora_B=_filled(update.lora_B, rank, 1))


def with_alpha(update: Update) -> Update:
    """`update` with a rank that some alpha over it is its factor: of a power of two, one always is, short of overflow."""
    if alpha_for(update.scaling, update.r, update.lora_alpha) is not None:
        return update
    return with_rank(update, 1 << (update.r - 1).bit_length())


def one_for_all(updates: Sequence[Update], of: Callable[[Update], float | None]) -> float:
    """The number that `of` gives for most of `updates`, not 0 where one has another; the first's factor where it gives none."""
    numbers = Counter(number for update in updates if (number := of(update)) is not None)
    numbers = Counter({number: count for number, count in numbers.items() if number}) or numbers
    return numbers.most_common(1)[0][0] if numbers else updates[0].scaling


def with_scaling(updates: Sequence[Update], wanted: Callable[[Update], float], *, rounded: bool) -> tuple[list[Update], list[str]]:
    """`updates` with the factor that `wanted` says for each, what is left of their own in lora_B; and notes.

    Raises `UnsupportedAdapterError` where lora_B would be rounded by that, unless `rounded`.
    """
    done, inexact, baked = [], [], 0
    for update in updates:
        target = wanted(update)
        if update.scaling != target:
            if target == 0:
                raise UnsupportedAdapterError(f"{printable(update.name)}: no factor of lora_B turns 0 into {update.scaling:g}")
            baked += 1
            product, exact = _times(update.lora_B, Fraction(update.scaling) / Fraction(target))
            if not exact:
                inexact.append(update.name)
            update = replace(update, lora_B=product, scaling=target)
        done.append(update)
    if inexact and not rounded:
        raise UnsupportedAdapterError(
            f"the format has one factor for all modules; those of {len(inexact)} would go into lora_B, and round it, by up to 2^-24"
            f" of each number: {_some(inexact)}",
            hint="nothing was written; `allow_rounding=True` accepts that, or choose a format with a factor for each module: peft",
        )
    notes = []
    if baked:
        how = f", rounded to float32 in {len(inexact)}" if inexact else ", exactly"
        notes.append(f"the factors of {baked} modules went into their lora_B{how}")
    return done, notes


def stored(updates: Sequence[Update], *, rounded: bool) -> tuple[list[Update], list[str]]:
    """`updates` with all tensors in a type that formats have in common; and notes.

    Raises `UnsupportedAdapterError` where that is a rounding of float64, unless `rounded`.
    """
    wide = [update.name for update in updates if any(tensor.dtype not in STORED for tensor in _tensors(update))]
    if wide and not rounded:
        raise UnsupportedAdapterError(
            f"the factors of {len(wide)} modules need float64, which the format's readers do not have: {_some(wide)}",
            hint="nothing was written; `allow_rounding=True` rounds them to float32",
        )
    narrow = [
        replace(
            update,
            lora_A=_narrow(update.lora_A),
            lora_B=_narrow(update.lora_B),
            magnitude=None if update.magnitude is None else _narrow(update.magnitude),
            lora_bias=None if update.lora_bias is None else _narrow(update.lora_bias),
        )
        for update in updates
    ]
    return narrow, [f"the factors of {len(wide)} modules were rounded to float32"] if wide else []


def _times(tensor: Tensor, by: Fraction) -> tuple[Tensor, bool]:
    """`tensor` times `by` in its own type or float32, and whether nothing was rounded."""
    factor = float(by)
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(tensor.dtype, 53)
    exact = Fraction(factor) == by and _bits(by) + bits <= 53
    product = tensor.double() * factor  # exact in that case
    for dtype in (tensor.dtype, torch.float32):
        if torch.equal(product.to(dtype).double(), product):
            return product.to(dtype), exact
    return product.float(), False


def _bits(number: Fraction) -> int:
    """Binary digits from the first to the last that is not 0, of a float."""
    numerator = abs(number.numerator)
    return numerator.bit_length() - (numerator & -numerator).bit_length() + 1 if numerator else 0


def _filled(tensor: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(tensor.shape)
    missing[dim] = rank - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(missing)], dim) if missing[dim] else tensor


def _tensors(update: Update) -> list[Tensor]:
    return [t for t in (update.lora_A, update.lora_B, update.magnitude, update.lora_bias) if t is not None]


def _narrow(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in STORED else tensor.float()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

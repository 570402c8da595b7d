"""From a wide number to the grid of a weight's dtype, rounded once.

torch casts float64 to bfloat16 or float16 by way of float32, which rounds twice. `to_nearest` does it right. `to_stochastic` rounds
up with the probability that the number lies towards the upper neighbour, from random numbers that are a function of (seed, tensor
name, element index): the same on every machine, and so verifiable.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UpdateError
from .cpu.loader import build
from .update import shown

HALVES = (torch.bfloat16, torch.float16)
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
SMALLEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14}


@dataclass(frozen=True)
class Stochastic:
    """Stochastic rounding, reproducible: element i of the tensor takes its random bits from (seed, tensor, i).

    - `tensor`: the tensor's name, so that tensors of one seed draw different numbers
    - `start`: the index in the whole tensor of the first element of the block at hand

    Raises `UpdateError` where one of them is of another type, or `start` is negative.

    float32 and float64 weights round to nearest all the same: their grids swallow nothing that an adapter holds.

    >>> import torch
    >>> from lorafold import LowRankUpdate, Stochastic, merge_weight
    >>> W, tiny = torch.ones(1, 1000).bfloat16(), LowRankUpdate(torch.ones(1, 1000), torch.ones(1, 1), scaling=2**-10)
    >>> bool((merge_weight(W, [tiny]) == W).all())  # an eighth of the step from 1 upward: to nearest it is lost
    True
    >>> moved = merge_weight(W, [tiny], rounding=Stochastic(seed=3, tensor="lm_head.weight")) > W
    >>> 0.05 < moved.float().mean() < 0.2  # about one in eight goes up by a whole step
    tensor(True)
    """

    seed: int = 0
    tensor: str = ""
    start: int = 0

    def __post_init__(self) -> None:
        for name, value, kind in (("seed", self.seed, int), ("tensor", self.tensor, str), ("start", self.start, int)):
            if not isinstance(value, kind) or isinstance(value, bool) or (name == "start" and not 0 <= self.start < 1 << 63):
                raise UpdateError(f"{name} of stochastic rounding must be of type {kind.__name__}, not {shown(value)}")

    @property
    def key(self) -> int:
        """64 bits that stand for seed and name, as a signed integer."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.tensor}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def uniform(self, count: int) -> Tensor:
        """(count,) float32 in (0, 1), of the elements from `start` on."""
        return _uniform(count, self, torch.device("cpu"))


Rounding = Literal["nearest", "stochastic"] | Stochastic


def noise_of(rounding: Rounding, dtype: torch.dtype) -> Stochastic | None:
    """The source of random bits for results of `dtype`, or None where they are rounded to nearest.

    Raises `UpdateError` where `rounding` is none.
    """
    if isinstance(rounding, Stochastic):
        return rounding if dtype in HALVES else None
    if isinstance(rounding, str) and rounding in ("nearest", "stochastic"):
        return Stochastic() if rounding == "stochastic" and dtype in HALVES else None
    raise UpdateError(f"rounding must be 'nearest', 'stochastic' or a Stochastic, not {shown(rounding)}")


def to_odd(head: Tensor, rest: Tensor) -> Tensor:
    """The float64 that stands for head + rest in any later rounding to fewer bits: the neighbour with an odd last bit.

    Round-to-odd with two spare bits makes a second rounding harmless (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008). Beside a
    head of zero that is the smallest subnormal number, with the sign of rest.
    """
    bits = head.view(torch.int64)
    outward = torch.where((rest > 0) == (head > 0), 1, -1)
    odd = torch.where((rest != 0) & (bits & 1 == 0), bits + outward, bits).view(torch.float64)
    return torch.where((head == 0) & (rest != 0), torch.copysign(torch.full_like(rest, 2.0**-1074), rest), odd)


def to_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `x` rounded once to `dtype`, ties to even.

    >>> x = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)  # just above the middle of two bfloat16
    >>> to_nearest(x, torch.bfloat16).item(), x.to(torch.bfloat16).item()
    (1.0078125, 1.0)
    """
    if dtype not in HALVES:
        return x.to(dtype)
    single = x.to(torch.float32)
    bits = single.view(torch.int32)
    outward = torch.where(x.abs() > single.abs(), 1, -1).to(torch.int32)
    inexact = (single.double() != x) & ~x.isnan()
    return torch.where(inexact & (bits & 1 == 0), bits + outward, bits).view(torch.float32).to(dtype)


def to_stochastic(single: Tensor, dtype: torch.dtype, rounding: Stochastic) -> Tensor:
    """Contiguous float32 `single` rounded to `dtype` (bfloat16 or float16), up or down at random and unbiased.

    Where the element lies the share p of the way from its neighbour nearer zero to the one beyond, it goes to the one beyond where
    p exceeds a uniform number of 23 bits. What rounds to a finite number to nearest stays finite.
    """
    rounded = torch.empty_like(single, dtype=dtype)
    each = _DRAWN if single.device.type == "cpu" else max(1, single.numel())
    for start in range(0, single.numel(), each):
        part = slice(start, start + each)
        rounded.view(-1)[part] = _to_stochastic(single.view(-1)[part], dtype, replace(rounding, start=rounding.start + start))
    return rounded


def to_stochastic_at(places: Tensor, single: Tensor, dtype: torch.dtype, rounding: Stochastic) -> Tensor:
    """`to_stochastic` of the elements whose indices in the block are the int64 `places`; both (n,)."""
    return _noised(single, dtype, _hashed(places + (rounding.start + 1), rounding.key))


_DRAWN = 1 << 16  # elements at once, whose intermediate numbers stay in the cache


def _to_stochastic(single: Tensor, dtype: torch.dtype, rounding: Stochastic) -> Tensor:
    return _noised(single, dtype, _uniform(single.numel(), rounding, single.device))


def _noised(single: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    exponents = single.view(torch.int32) & 0x7F800000
    smallest = 2.0 ** SMALLEST_EXPONENT[dtype]
    step = exponents.view(torch.float32).clamp_(min=smallest).mul_(2.0 ** -MANTISSA_BITS[dtype])
    steps = single.abs().div_(step)  # exact: step is a power of two
    whole = steps.floor()
    beyond = steps.sub_(whole) > uniform.view_as(single)
    rounded = whole.add_(beyond).mul_(step).copysign_(single)
    largest = torch.finfo(dtype).max
    if bool(rounded.abs().max() <= largest):
        return rounded.to(dtype)
    nearest = single.to(dtype)
    nearest.masked_fill_(nearest.isnan(), torch.nan)  # torch's cast leaves bits that depend on the processor
    return torch.where(nearest.isfinite(), rounded.clamp_(-largest, largest).to(dtype), nearest)


def _uniform(count: int, rounding: Stochastic, device: torch.device) -> Tensor:
    """(count,) float32 in (0, 1): odd multiples of 2⁻²⁴, a hash of (key, element index).

    The hash is SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014) on key + (index + 1) · golden ratio.
    """
    if device.type == "cpu" and (used := build()) is not None:
        uniform = torch.empty(count, dtype=torch.float32, device="cpu")
        used.uniform(uniform, rounding.start, rounding.key)
        return uniform
    return _hashed(torch.arange(rounding.start + 1, rounding.start + 1 + count, dtype=torch.int64, device=device), rounding.key)


def _hashed(z: Tensor, key: int) -> Tensor:
    """The number of each index + 1 in `z`, which is used up."""
    shifted = torch.empty_like(z)
    z.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    z.bitwise_xor_(_shifted(z, 30, shifted)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shifted(z, 27, shifted)).mul_(_signed(0x94D049BB133111EB))
    z.bitwise_xor_(_shifted(z, 31, shifted))
    return _shifted(z, 41, shifted).mul_(2).add_(1).to(torch.float32).mul_(2.0**-24)


def _shifted(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant

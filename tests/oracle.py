"""What the correctly rounded sum is, computed without torch: numpy long doubles, and fractions where those are too near a tie."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

# dtype: (bits of precision p, smallest exponent of a normal number, largest finite number)
GRID = {
    torch.bfloat16: (8, -126, float(torch.finfo(torch.bfloat16).max)),
    torch.float16: (11, -14, float(torch.finfo(torch.float16).max)),
    torch.float32: (24, -126, float(torch.finfo(torch.float32).max)),
    torch.float64: (53, -1022, float(torch.finfo(torch.float64).max)),
}


def round_fraction(x: Fraction, dtype: torch.dtype) -> float:
    """The real number x rounded to the grid of `dtype`, ties to even; infinity from half a step above the largest number on."""
    if x == 0:
        return 0.0
    p, smallest, largest = GRID[dtype]
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent  # 2^exponent ≤ size < 2^(exponent + 1)
    step = Fraction(2) ** (max(exponent, smallest) - p + 1)
    rounded = round(size / step) * step  # Python rounds fractions half to even
    result = float("inf") if rounded > Fraction(largest) else float(rounded)
    return -result if x < 0 else result


def exact_sum(weight: float, terms: list[tuple[float, float, float]]) -> Fraction:
    """weight + Σ s·b·a as a rational number."""
    return Fraction(weight) + sum((Fraction(s) * Fraction(b) * Fraction(a) for s, b, a in terms), Fraction(0))


def correctly_rounded(weight: torch.Tensor, updates: list, dtype: torch.dtype) -> np.ndarray:
    """(out, in) float64: the real sum of a weight and its updates, rounded once to `dtype`."""
    W = weight.double().numpy()
    B = [update.lora_B.double().numpy() for update in updates]
    A = [update.lora_A.double().numpy() for update in updates]
    s = [update.scaling for update in updates]
    total, size, count = W.astype(np.longdouble), np.abs(W).astype(np.longdouble), 1
    for b, a, factor in zip(B, A, s, strict=True):
        for k in range(b.shape[1]):
            product = b[:, k, None].astype(np.longdouble) * a[k].astype(np.longdouble) * np.longdouble(factor)
            total, size, count = total + product, size + np.abs(product), count + 1
    p, smallest, _ = GRID[dtype]
    with np.errstate(all="ignore"):
        exponent = np.maximum(np.frexp(total)[1] - 1, smallest)
        step = np.ldexp(np.longdouble(1), exponent - p + 1)
        steps = total / step
        rounded = (np.rint(steps) * step).astype(np.float64)
        # a long double has 64 bits: every operation may be off by 2^-64 of its size, and there are count + 3 in a row
        doubt = np.abs(np.abs(steps - np.trunc(steps)) - 0.5) * step <= size * np.longdouble(2.0**-63) * (count + 3)
        doubt |= (rounded == 0) | ~np.isfinite(rounded) | (np.abs(rounded) >= GRID[dtype][2])
    for i, j in zip(*np.nonzero(doubt), strict=True):
        terms = [(f, float(b[i, k]), float(a[k, j])) for b, a, f in zip(B, A, s, strict=True) for k in range(b.shape[1])]
        real = exact_sum(float(W[i, j]), terms)
        rounded[i, j] = round_fraction(real, dtype)
        if real < 0 and rounded[i, j] == 0:
            rounded[i, j] = -0.0
    return rounded


def same_bits(result: torch.Tensor, expected: np.ndarray) -> bool:
    """Whether `result` holds exactly the numbers `expected`, signs of zeros included."""
    found = result.double().numpy()
    return np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected))


def length(numbers):
    """√Σ x², as `lorafold.kernel.wide` defines it, in Python's float64."""
    sums = [0.0] * 64
    for j, x in enumerate(numbers):
        sums[j % 64] += x * x
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return math.sqrt(sums[0])

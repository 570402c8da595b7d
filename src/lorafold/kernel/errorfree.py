"""Arithmetic without rounding error on float64 tensors: what `exact` falls back on where float64 alone cannot tell.

Error-free transformations after Knuth (two_sum), Dekker (two_product) and Ogita, Rump and Oishi, "Accurate sum and dot product",
SIAM J. Sci. Comput. 26 (2005). Each works element by element and is right in round-to-nearest arithmetic without fused operations,
which is what torch's eager operators do on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from ..arithmetic import subnormal_numbers

_SPLITTER = 134217729.0  # 2^27 + 1: cuts a float64 into two halves of 26 bits
_SAFE = 2.0**900  # beyond it, and below its reciprocal, Dekker's split may overflow or lose bits


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(s, e) with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) of 26 bits each, whose sum is `a` exactly; products of such halves are exact."""
    t = _SPLITTER * a
    high = t - (t - a)
    return high, a - high


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(p, e) with p = fl(a · b) and p + e = a · b exactly, where nothing over- or underflows (`_SAFE`)."""
    p = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def exact_sums(weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """The real number weight + Σ_k scaling_k · lora_B_k · lora_A_k for each of n elements.

    - `weight`: (n,); `lora_B`, `lora_A`: (n, R); `scaling`: (R,); all float64

    Returns (head, rest), each (n,) float64: head is the real sum x rounded to nearest, infinity where x is beyond the largest
    number, and `rest` has the sign of x - head, zero only where head is x. Over- and underflow, sums so near a tie of float64 that
    they take more words than are kept, and elements that are few are done in fractions.
    """
    head, rest, doubtful = torch.empty_like(weight), torch.empty_like(weight), torch.ones_like(weight, dtype=torch.bool)
    for words in (2, _WORDS):
        left = doubtful.nonzero().flatten()
        if left.numel() > _FEW:
            head[left], rest[left], doubtful[left] = _by_words(weight[left], lora_B[left], lora_A[left], scaling, words)
    for i in doubtful.nonzero().flatten().tolist():
        head[i], rest[i] = _fraction_sum(float(weight[i]), lora_B[i].tolist(), lora_A[i].tolist(), scaling.tolist())
    return head, rest


def _by_words(weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(head, rest, whether they are not certain), for all elements at once, from `count` words of each sum and a bound on more."""
    terms, doubtful = _terms(weight, lora_B, lora_A, scaling)
    words = []
    for _ in range(count):
        total, terms = _sum(terms)
        words.append(total)
    head, rest, settled = _normalized(words, terms.abs().sum(dim=1) * (1 + 2.0**-20))  # which bounds the sum's own roundings
    return head, rest, doubtful | ~settled


def _sum(terms: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) float64 sums of the (n, K) terms, added in pairs, and (n, about K) what the additions lost: together the exact sum."""
    lost = []
    while terms.shape[1] > 1:
        if terms.shape[1] % 2:
            terms = torch.nn.functional.pad(terms, (0, 1))
        half = terms.shape[1] // 2
        terms, error = two_sum(terms[:, :half], terms[:, half:])
        lost.append(error)
    return terms[:, 0], torch.cat(lost, dim=1) if lost else torch.zeros_like(terms)


_FEW = 4
"""Elements that fractions take no longer for than tensors of so few numbers."""

_WORDS = 4
"""float64 words kept of a sum; 4 hold over 200 bits, more than products of float32 numbers of like size need."""


def _terms(weight: Tensor, lora_B: Tensor, lora_A: Tensor, scaling: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1 + 4R) summands, split until each is a float64 exactly, and (n,) whether that is not certain."""
    zero = (lora_B == 0) | (lora_A == 0) | (scaling == 0)
    lora_B, lora_A, scaling = (x.masked_fill(zero, 0.0) for x in (lora_B, lora_A, scaling.expand_as(zero)))  # 0 · 1e300 · 1e300
    product, low = two_product(lora_B, lora_A)
    terms = [weight[:, None], *two_product(product, scaling), *two_product(low, scaling)]
    certain = torch.ones_like(zero)
    for size in (product.abs(), (product * scaling).abs()):
        certain &= ((size < _SAFE) & (size > 1 / _SAFE)) | zero
    return torch.cat(terms, dim=1), ~certain.all(dim=1)


def _normalized(words: list[Tensor], error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The words of a sum made non-overlapping: (largest word, the next one that is not zero, whether both are certain).

    - `error`: (n,) a bound on what the words lack. It is harmless where it is less than the last bit of the second word, of which
      then neither the sign changes nor, beside half a step of the first, more than what is looked at anyway
    """
    words = list(words)
    for _ in range(len(words) + 1):
        settled = torch.ones_like(words[0], dtype=torch.bool)
        for i in reversed(range(len(words) - 1)):
            total, lost = two_sum(words[i], words[i + 1])
            settled &= (total == words[i]) & (lost == words[i + 1])
            words[i], words[i + 1] = total, lost
    rest = torch.zeros_like(words[0])
    for word in reversed(words[1:]):
        rest = torch.where(word != 0, word, rest)
    # a second word of exactly half a step leaves the rounding of the first to what follows: too fine for this place
    grown = torch.nextafter(words[1], torch.copysign(torch.full_like(words[1], torch.inf), words[1]))
    third = words[2] if len(words) > 2 else torch.zeros_like(rest)
    settled &= (error == 0) | ((words[1] != 0) & (error < words[1].abs() * 2.0**-55))
    settled &= (words[1] == 0) | (words[0] + grown == words[0]) | ((third == 0) & (error == 0))
    return words[0], rest, settled & words[0].isfinite() & error.isfinite()


def _fraction_sum(weight: float, lora_B: list[float], lora_A: list[float], scaling: list[float]) -> tuple[float, float]:
    """The same sum in rational numbers, for one element."""
    total = Fraction(weight)
    for b, a, s in zip(lora_B, lora_A, scaling, strict=True):
        total += Fraction(b) * Fraction(a) * Fraction(s)
    try:
        head = float(total)
    except OverflowError:
        return float("inf") if total > 0 else float("-inf"), 0.0
    difference = total - Fraction(head)
    return head, float((difference > 0) - (difference < 0))


_BITS = 106
"""Of which slices are made: two float64's."""


def product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """`one` @ `other` as the sum of two float64 matrices, the first of which is the sum rounded.

    Off by some 2⁻¹⁰⁴ of the largest number in the row times the largest in the column, times the number of products.

    - `one`: (rows, inner), `other`: (inner, columns), float64

    >>> third = torch.tensor([[1 / 3, -1 / 3]], dtype=torch.float64)
    >>> high, low = product(third, torch.tensor([[3.0], [3.0 - 2.0**-51]], dtype=torch.float64))
    >>> float(high) == 2.0**-51 / 3, float(low)
    (True, 0.0)
    """
    with subnormal_numbers(workers=True):
        return _product(one, other)


def _product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    inner = max(1, one.shape[1])
    bits = (53 - math.ceil(math.log2(inner))) // 2
    count = math.ceil(_BITS / bits)
    turned = one.numel() < other.numel()  # the larger one is cut as it goes, so that its slices need not be kept
    large, small = (other, one) if turned else (one, other)
    kept = list(_slices(small, 1 if turned else 0, bits, count))
    high = low = one.new_zeros(one.shape[0], other.shape[1])
    for i, piece in enumerate(_slices(large, 0 if turned else 1, bits, count)):
        for each in kept[: count + 1 - i]:
            high, error = _two_sum(high, each @ piece if turned else piece @ each)
            low = low + error
    return _two_sum(high, low)


def _slices(matrix: Tensor, dim: int, bits: int, count: int) -> Iterator[Tensor]:
    """`matrix` as a sum of matrices whose numbers are, along `dim`, multiples of one power of two, of `bits` bits each."""
    for _ in range(count):
        largest = matrix.abs().amax(dim, keepdim=True)
        if not largest.any():
            return
        above = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent + 53 - bits)
        piece = (matrix + 0.75 * above) - 0.75 * above
        yield piece
        matrix = matrix - piece


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b, and what rounding took from it (Knuth, The Art of Computer Programming, volume 2, section 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)

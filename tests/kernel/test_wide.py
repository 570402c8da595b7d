"""W + ΔW in float64, and lengths, as they are defined: the bits of plain Python, within their bound, however they are cut."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import wide
from lorafold.kernel.update import LowRankUpdate
from lorafold.kernel.wide import add_squares, column_lengths, row_lengths, wide_delta
from oracle import exact_sum, length

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def case(seed, rows, columns, r, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    lora_A, lora_B = torch.randn(r, columns, generator=g, dtype=torch.float64), torch.randn(rows, r, generator=g) * 0.1
    return torch.randn(rows, columns, generator=g).bfloat16(), LowRankUpdate(lora_A.to(dtype), lora_B.to(dtype), 0.3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    r=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_as_it_is_defined(seed, rows, columns, r, dtype):
    """Bit for bit what Python's float64 gives, and as near to the real sum as the roundings allow."""
    weight, update = case(seed, rows, columns, r, dtype)
    delta = wide_delta(update)
    found = weight.double() + delta
    for i in range(rows):
        for j in range(columns):
            terms = [(float(update.lora_B[i, k]), float(update.lora_A[k, j])) for k in range(r)]
            total = 0.0
            for b, a in terms:
                total += b * a
            assert float(delta[i, j]) == update.scaling * total
            w, scaled = float(weight[i, j]), [(update.scaling, b, a) for b, a in terms]
            size = abs(Fraction(w)) + sum(abs(Fraction(s) * Fraction(b) * Fraction(a)) for s, b, a in scaled)
            bound = size * (r + 2) * Fraction(2) ** -53 * (1 + Fraction(2) ** -40)  # what is of second order
            assert abs(Fraction(float(found[i, j])) - exact_sum(w, scaled)) <= bound


@pytest.mark.parametrize("tile", [1, 100, 1 << 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cuts_and_threads_change_nothing(tile, threads, monkeypatch):
    weight, update = case(1, 301, 257, 7)
    expected = weight.double() + wide_delta(update)
    lengths, squares = row_lengths(expected), torch.zeros(257, dtype=torch.float64)
    add_squares(squares, expected)
    monkeypatch.setattr(wide, "_TILE", tile)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(weight.double() + wide_delta(update), expected)
        starts = range(0, 301, 43)
        parts = [weight[i : i + 43].double() + wide_delta(update.narrow(0, i, min(43, 301 - i))) for i in starts]
        assert torch.equal(torch.cat(parts), expected)
        assert torch.equal(torch.cat([row_lengths(part) for part in parts]), lengths)
        again = torch.zeros(257, dtype=torch.float64)
        for part in parts:
            add_squares(again, part)
        assert torch.equal(again, squares)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 64, 65, 257, 1000])
def test_lengths(columns):
    """A square is rounded, and goes through columns / 64 + 6 additions at most; the root halves that, and is rounded itself."""
    matrix = torch.randn(5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    for row, found in zip(matrix.tolist(), row_lengths(matrix).tolist(), strict=True):
        assert found == length(row)
        real = math.sqrt(sum(Fraction(x) ** 2 for x in row))  # rounded twice, to within 2^-52
        assert found == pytest.approx(real, rel=(columns / 128 + 6 + 2) * 2.0**-53, abs=0)
    assert torch.equal(matrix, before)


def test_lengths_of_columns():
    """Squares in order of rows; where several columns are one output, the length of their lengths."""
    matrix = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    squares = torch.zeros(12, dtype=torch.float64)
    add_squares(squares, matrix)
    roots = []
    for column in matrix.T.tolist():
        total = 0.0
        for x in column:
            total += x * x
        roots.append(math.sqrt(total))
    assert column_lengths(squares).tolist() == [length([root]) for root in roots]
    assert column_lengths(squares, 3).tolist() == [length(roots[j - j % 3 : j - j % 3 + 3]) for j in range(12)]

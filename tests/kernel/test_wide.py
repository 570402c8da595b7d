"""W + ΔW in float64 as it is defined: the bits of plain Python, within their bound of the real sum, however it is cut."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import wide
from lorafold.kernel.update import LowRankUpdate
from lorafold.kernel.wide import add_column_squares, row_norms, wide_sum
from oracle import exact_sum


def case(seed, rows, columns, ranks, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    return weight, [
        LowRankUpdate(torch.randn(r, columns, generator=g), torch.randn(rows, r, generator=g) * 0.1, 0.3 + i)
        for i, r in enumerate(ranks)
    ]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_as_it_is_defined(seed, rows, columns, ranks, dtype):
    """Bit for bit what Python's float64 gives, and as near to the real sum as the roundings allow."""
    weight, updates = case(seed, rows, columns, ranks, dtype)
    found = wide_sum(weight, updates)
    for i in range(rows):
        for j in range(columns):
            total = float(weight[i, j])
            terms = [(u.scaling, float(u.lora_B[i, k]), float(u.lora_A[k, j])) for u in updates for k in range(u.r)]
            for s, b, a in terms:
                total += (b * s) * a
            assert float(found[i, j]) == total
            size = abs(Fraction(float(weight[i, j]))) + sum(abs(Fraction(s) * Fraction(b) * Fraction(a)) for s, b, a in terms)
            bound = size * (sum(ranks) + 2) * Fraction(2) ** -53 * (1 + Fraction(2) ** -40)  # what is of second order
            assert abs(Fraction(total) - exact_sum(float(weight[i, j]), terms)) <= bound


@pytest.mark.parametrize("tile", [1, 100, 1 << 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cuts_and_threads_change_nothing(tile, threads, monkeypatch):
    weight, updates = case(1, 301, 257, [7, 3])
    expected, norms = wide_sum(weight, updates), row_norms(wide_sum(weight, updates))
    squares = torch.zeros(257, dtype=torch.float64)
    add_column_squares(squares, expected)
    monkeypatch.setattr(wide, "_TILE", tile)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(wide_sum(weight, updates), expected)
        parts = [wide_sum(weight[i : i + 43], [u.narrow(0, i, min(43, 301 - i)) for u in updates]) for i in range(0, 301, 43)]
        assert torch.equal(torch.cat(parts), expected)
        assert torch.equal(torch.cat([row_norms(part) for part in parts]), norms)
        again = torch.zeros(257, dtype=torch.float64)
        for part in parts:
            add_column_squares(again, part)
        assert torch.equal(again, squares)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 257])
def test_norms(columns):
    """Of n squares added in pairs: each goes through log2(n) + 2 additions at most, is rounded once itself, and so is the root."""
    matrix = torch.randn(5, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    for row, norm in zip(matrix, row_norms(matrix), strict=True):
        real = math.fsum(Fraction(x) ** 2 for x in row.tolist()) ** 0.5
        assert float(norm) == pytest.approx(real, rel=(math.log2(columns) + 5) * 2.0**-53, abs=0)
    assert torch.equal(matrix, before)

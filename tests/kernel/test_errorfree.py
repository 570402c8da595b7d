"""Products to twice the digits: against fractions, with numbers of very different sizes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel.errorfree import product


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_twice_the_digits(rows: int, inner: int, columns: int, seed: int, spread: int) -> None:
    random = np.random.default_rng(seed)
    one, other = (
        random.standard_normal(shape) * 2.0 ** random.integers(-spread, spread + 1, shape)
        for shape in ((rows, inner), (inner, columns))
    )
    high, low = (each.numpy() for each in product(torch.from_numpy(one), torch.from_numpy(other)))
    for i in range(rows):
        for j in range(columns):
            real = sum((Fraction(a) * Fraction(b) for a, b in zip(one[i], other[:, j], strict=True)), Fraction(0))
            # what is cut off each factor is 2^-106 of its largest; low is rounded as often as there are products of slices
            bound = Fraction(2.0**-100) * inner * Fraction(np.abs(one[i]).max()) * Fraction(np.abs(other[:, j]).max())
            assert abs(Fraction(high[i, j]) + Fraction(low[i, j]) - real) <= bound
            assert high[i, j] == high[i, j] + low[i, j]


def test_zeros_and_shapes() -> None:
    high, low = product(torch.zeros(2, 3, dtype=torch.float64), torch.ones(3, 5, dtype=torch.float64))
    assert high.shape == low.shape == (2, 5)
    assert not high.any()
    assert not low.any()

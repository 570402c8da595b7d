"""An update is a value, closed under what fused, transposed and summed weights need."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafold.errors import UpdateError
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.update import LowRankUpdate, scaling_factor


def update(seed=0, rows=5, columns=7, r=3, scaling=0.5):
    g = torch.Generator().manual_seed(seed)
    return LowRankUpdate(torch.randn(r, columns, generator=g), torch.randn(rows, r, generator=g), scaling)


def dense(u):
    return u.dense(torch.float64)


@given(start=st.integers(0, 4), length=st.integers(0, 1), dim=st.sampled_from([0, 1]))
def test_narrow_and_transpose_commute_with_dense(start, length, dim):
    u = update()
    assert torch.equal(dense(u.narrow(dim, start, length)), dense(u).narrow(dim, start, length))
    assert torch.allclose(dense(u.T), dense(u).T, rtol=1e-15, atol=0)  # the same products, summed in another order


def test_scaled_shares_the_factors():
    u = update()
    assert u.scaled(2.0).scaling == 1.0
    assert u.scaled(2.0).lora_A is u.lora_A


@pytest.mark.parametrize("scalings", [(0.5, 0.5), (0.5, 3.0), (1.0, -2.0)])
def test_cat_is_the_sum(scalings):
    one, two = (update(seed, scaling=s) for seed, s in enumerate(scalings))
    both = one.cat(two)
    assert both.r == 6
    assert torch.allclose(dense(both), dense(one) + dense(two), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("lora_A", "lora_B", "scaling", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), 1.0, "found"),
        (torch.zeros(2), torch.zeros(4, 2), 1.0, "found"),
        (torch.zeros(0, 3), torch.zeros(4, 0), 1.0, "rank of 0"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 2), 1.0, "floating point"),
        (torch.zeros(2, 3), torch.zeros(4, 2), math.nan, "finite"),
        (torch.zeros(2, 3), torch.zeros(4, 2), True, "finite"),
    ],
)
def test_factors_that_do_not_fit(lora_A, lora_B, scaling, says):
    with pytest.raises(UpdateError, match=says):
        LowRankUpdate(lora_A, lora_B, scaling)


def test_cat_of_different_shapes():
    with pytest.raises(UpdateError, match="different shapes"):
        update().cat(update(rows=6))


@pytest.mark.parametrize(("r", "alpha"), [(0, 1.0), (-1, 1.0), (8, math.nan), (8, math.inf)])
def test_scaling_factor_refuses(r, alpha):
    with pytest.raises(UpdateError):
        scaling_factor(r, alpha)


@pytest.mark.parametrize("one", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_factors_of_any_two_dtypes_go_together(one, other):
    """torch has no common type for floats of eight bits and others."""
    g = torch.Generator().manual_seed(2)
    updates = [LowRankUpdate(torch.randn(2, 8, generator=g).to(d), torch.randn(6, 2, generator=g).to(d), 0.5) for d in (one, other)]
    weight = torch.randn(6, 8, generator=g)
    plain = [LowRankUpdate(update.lora_A.double(), update.lora_B.double(), 0.5) for update in updates]
    assert torch.equal(merge_weight(weight, updates), merge_weight(weight, plain))
    assert torch.equal(updates[0].cat(updates[1]).dense(torch.float64), plain[0].cat(plain[1]).dense(torch.float64))

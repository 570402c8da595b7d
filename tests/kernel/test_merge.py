"""The promises of `merge_weight` beside `exact`: one rounding, any order, any strides, no global touched, errors that say what."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from lorafold.errors import UpdateError
from lorafold.kernel.merge import merge_measured, merge_weight
from lorafold.kernel.rounding import Stochastic
from lorafold.kernel.stats import Kept
from lorafold.kernel.update import LowRankUpdate
from oracle import GRID

DTYPES = list(GRID)


def case(seed, rows=33, columns=47, ranks=(4,), dtype=torch.bfloat16, size=0.05):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g, dtype=torch.float64) * 0.02).to(dtype)
    return weight, [
        LowRankUpdate(torch.randn(r, columns, generator=g) * size, torch.randn(rows, r, generator=g) * size, 0.5 + i)
        for i, r in enumerate(ranks)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), ranks=st.lists(st.integers(1, 40), min_size=1, max_size=3))
def test_fast_is_one_rounding_from_a_wide_sum(dtype, seed, ranks):
    """|fast − real| ≤ ½ ulp + the error of the wide sum, γ_{R+5}·(|W| + Σ|s·B·A|), which is all that stands between them."""
    weight, updates = case(seed, ranks=ranks, dtype=dtype)
    merged = merge_weight(weight, updates, precision="fast").double().numpy().astype(np.longdouble)
    real, size = weight.double().numpy().astype(np.longdouble), weight.double().abs().numpy().astype(np.longdouble)
    for update in updates:
        b, a = (t.double().numpy().astype(np.longdouble) for t in (update.lora_B, update.lora_A))
        real, size = real + update.scaling * (b @ a), size + update.scaling * (np.abs(b) @ np.abs(a))
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    p, smallest, _ = GRID[dtype]
    half_ulp = np.ldexp(0.5, np.maximum(np.frexp(np.abs(real) * (1 + 2.0**-10))[1] - 1, smallest) - p + 1)
    assert np.all(np.abs(merged - real) <= half_ulp + size * unit * (sum(ranks) + 5) * 1.01)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), precision=st.sampled_from(["fast", "exact"]), dtype=st.sampled_from(DTYPES))
def test_order_of_adapters_changes_no_bit(seed, precision, dtype):
    weight, (a, b, c) = case(seed, ranks=(3, 8, 8), dtype=dtype)
    first = merge_weight(weight, [a, b, c], precision=precision)
    for order in ([c, b, a], [b, a, c]):
        assert torch.equal(merge_weight(weight, order, precision=precision), first)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), start=st.integers(0, 30), length=st.integers(1, 3), dim=st.sampled_from([0, 1]))
def test_narrow_commutes_with_merging(seed, start, length, dim):
    weight, updates = case(seed, ranks=(5, 2))
    whole = merge_weight(weight, updates, precision="exact").narrow(dim, start, length)
    parts = [update.narrow(dim, start, length) for update in updates]
    assert torch.equal(merge_weight(weight.narrow(dim, start, length), parts, precision="exact"), whole)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_transposed(precision, dtype):
    weight, updates = case(1, dtype=dtype)
    expected = merge_weight(weight, updates, precision=precision)
    in_place = weight.clone()
    assert merge_weight(in_place, updates, out=in_place, precision=precision) is in_place
    assert torch.equal(in_place, expected)
    stored = weight.T.contiguous()  # (in, out), as GPT-2's Conv1D keeps it
    merge_weight(stored.T, updates, out=stored.T, precision=precision)
    assert torch.equal(stored.T, expected)
    if precision == "exact":
        assert torch.equal(merge_weight(weight.T.contiguous(), [u.T for u in updates], precision="exact").T, expected)


def test_no_updates_is_a_copy():
    weight, _ = case(2)
    merged = merge_weight(weight, [])
    assert torch.equal(merged, weight)
    assert merged.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_global_switches_are_put_back_and_do_not_matter(precision):
    weight, updates = case(3, 200, 200, ranks=(16,), dtype=torch.float32)
    expected = merge_weight(weight, updates, precision=precision)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(merge_weight(weight, updates, precision=precision), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_graph_is_recorded():
    weight, _ = case(4)
    parameter = torch.nn.Parameter(torch.randn(33, 2))
    merged = merge_weight(torch.nn.Parameter(weight), [LowRankUpdate(torch.randn(2, 47), parameter, 1.0)])
    assert not merged.requires_grad


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.001, 0.02, 0.2])
def test_kept_is_the_quotient_of_the_inner_products(precision, dtype, size):
    """Sums of n = 1551 products in float32: relative error at most n·2⁻²⁴ ≈ 1e-4 of the norms."""
    weight, updates = case(5, dtype=dtype, size=size)
    merged, kept = merge_measured(weight, updates, precision=precision)
    delta = updates[0].dense(torch.float64)
    moved = merged.double() - weight.double()
    square = float((delta * delta).sum())
    assert kept.square == pytest.approx(square, rel=1e-4)
    assert kept.dot == pytest.approx(float((moved * delta).sum()), abs=1e-4 * float(moved.norm() * delta.norm()) + 1e-300)
    assert torch.equal(merged, merge_weight(weight, updates, precision=precision))


def test_kept_of_nothing_is_whole():
    assert Kept().share == 1.0


class TestStochastic:
    def test_same_seed_same_bits_whatever_the_blocks(self):
        weight, updates = case(6, 64, 64)
        noise = Stochastic(seed=7, tensor="w")
        whole = merge_weight(weight, updates, precision="exact", rounding=noise)
        assert torch.equal(whole, merge_weight(weight, updates, precision="exact", rounding=noise))
        rows = slice(17, 40)
        part = [update.narrow(0, 17, 23) for update in updates]
        block = Stochastic(seed=7, tensor="w", start=17 * 64)
        assert torch.equal(merge_weight(weight[rows], part, precision="exact", rounding=block), whole[rows])

    def test_seed_and_name_matter(self):
        weight, updates = case(6, 64, 64)
        one, two, three = (
            merge_weight(weight, updates, precision="exact", rounding=noise)
            for noise in (Stochastic(1, "w"), Stochastic(2, "w"), Stochastic(1, "v"))
        )
        assert not torch.equal(one, two)
        assert not torch.equal(one, three)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_neighbours_only_and_numbers_of_the_grid_stay(self, dtype):
        weight, updates = case(8, 100, 100, dtype=dtype)
        real = merge_weight(weight.double(), updates, precision="exact")
        merged = merge_weight(weight, updates, precision="exact", rounding=Stochastic(3)).double()
        nearest = merge_weight(weight, updates, precision="exact").double()
        step = 2 * (nearest - real).abs().max()  # no neighbour is further away than one step of the coarsest binade seen
        assert ((merged - real).abs() <= step * 1.0001).all()
        assert (merged != nearest).any()
        on_grid = merge_weight(weight, [LowRankUpdate(torch.ones(1, 100), torch.zeros(100, 1), 1.0)], rounding=Stochastic(3))
        assert torch.equal(on_grid, weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_unbiased(self, dtype):
        """250 000 equal elements a quarter of a step up: the share going up is 1/4 within 5 σ, σ = √(p(1−p)/n) = 0.00087."""
        step = torch.finfo(dtype).eps
        weight = torch.ones(500, 500, dtype=dtype)
        update = LowRankUpdate(torch.ones(1, 500), torch.full((500, 1), step / 4), 1.0)
        merged = merge_weight(weight, [update], precision="exact", rounding=Stochastic(11))
        assert set(merged.unique().tolist()) == {1.0, 1.0 + step}
        assert float((merged > 1).double().mean()) == pytest.approx(0.25, abs=0.0044)

    def test_keeps_what_nearest_swallows(self):
        """ΔW far below half a step: nearest gives the base back, stochastic moves it by the right amount on average."""
        weight, updates = case(9, 400, 400, dtype=torch.bfloat16, size=0.003)
        assert cosine_similarity(updates[0].dense(torch.float32).flatten(), weight.float().flatten(), 0).abs() < 0.05
        nearest = merge_measured(weight, updates, precision="exact")[1].share
        stochastic = merge_measured(weight, updates, precision="exact", rounding="stochastic")[1].share
        # its standard deviation is (rms step / √12..½) / (rms ΔW · √160 000): steps of 6e-5, ΔW of 1e-5, so below 0.02
        assert nearest < 0.8
        assert stochastic == pytest.approx(1.0, abs=0.08)

    def test_finite_stays_finite_and_wide_dtypes_round_to_nearest(self):
        largest = torch.finfo(torch.float16).max
        update = LowRankUpdate(torch.ones(1, 1000), torch.full((1, 1), 15.0), 1.0)
        weight = torch.full((1, 1000), largest, dtype=torch.float16)
        assert (merge_weight(weight, [update], rounding="stochastic") == largest).all()
        weight, updates = case(10, dtype=torch.float32)
        assert torch.equal(merge_weight(weight, updates, rounding="stochastic"), merge_weight(weight, updates))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight": torch.zeros(3, 4, 5)}, r"\(out_features, in_features\); found \(3, 4, 5\)"),
        ({"weight": torch.zeros(3, 4, dtype=torch.int32)}, "int32"),
        ({"weight": torch.zeros(4, 3)}, r"shape \(3, 4\) does not fit a weight of shape \(4, 3\)"),
        ({"out": torch.zeros(3, 5)}, r"found \(3, 5\)"),
        ({"precision": "double"}, "'fast' or 'exact', not 'double'"),
        ({"weight": torch.zeros(3, 4).bfloat16(), "rounding": "up"}, "not 'up'"),
    ],
)
def test_bad_arguments(change, says):
    arguments = {"weight": torch.zeros(3, 4), "updates": [LowRankUpdate(torch.zeros(2, 4), torch.zeros(3, 2), 1.0)], **change}
    with pytest.raises(UpdateError, match=says):
        merge_weight(**arguments)

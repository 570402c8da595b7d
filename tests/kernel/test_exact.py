"""`exact` is the correctly rounded real sum: against an oracle that does not use torch, on ties, at the ends of the range."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import merge as merge_module
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.update import LowRankUpdate
from oracle import GRID, correctly_rounded, same_bits

DTYPES = list(GRID)


def random_case(seed: int, rows: int, columns: int, ranks: list[int], dtype: torch.dtype, factor: torch.dtype, size: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g, dtype=torch.float64) * 0.02).to(dtype)
    updates = [
        LowRankUpdate(
            (torch.randn(r, columns, generator=g) * 0.05).to(factor),
            (torch.randn(rows, r, generator=g) * 0.05 * size).to(factor),
            float(torch.rand(1, generator=g)) * 4 - 1,
        )
        for r in ranks
    ]
    return weight, updates


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    ranks=st.lists(st.sampled_from([1, 2, 7, 16, 33, 64]), min_size=1, max_size=3),
    factor=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_equals_the_oracle_in_any_order(dtype, seed, rows, columns, ranks, factor, size):
    weight, updates = random_case(seed, rows, columns, ranks, dtype, factor, size)
    expected = correctly_rounded(weight, updates, dtype)
    for order in (updates, updates[::-1]):
        assert same_bits(merge_weight(weight, order, precision="exact"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 8, 64, 256])
def test_equals_the_oracle_at_size(dtype, r):
    n = 24 if dtype == torch.float64 else 96
    weight, updates = random_case(r, n, n + 1, [r], dtype, torch.float32)
    assert same_bits(merge_weight(weight, updates, precision="exact"), correctly_rounded(weight, updates, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tile_shape_and_thread_count_change_nothing(dtype, monkeypatch):
    weight, updates = random_case(5, 300, 257, [16, 8], dtype, torch.float32)
    expected = correctly_rounded(weight, updates, dtype)
    threads = torch.get_num_threads()
    try:
        for tile_bytes in (1, 5_000, 1 << 21):
            for count in (1, 2):
                monkeypatch.setitem(merge_module._TILE_BYTES, "cpu", tile_bytes)
                torch.set_num_threads(count)
                assert same_bits(merge_weight(weight, updates, precision="exact"), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_on_ties_and_beside_them(dtype):
    """W on the grid, ΔW half a step, or half a step and a breath: 2⁻⁶⁰ and 2⁻¹²⁰ of it, which no single wide sum can hold."""
    p = GRID[dtype][0]
    weight = torch.tensor([[1.0, 1.0 + 2.0 ** (1 - p), -1.0, 1.5, 2.0, 0.0]], dtype=dtype).repeat(4, 1)
    half = 2.0**-p
    breath = torch.tensor([[half, 0.0, 0.0], [half, 1.0, 0.0], [half, 0.0, -1.0], [-half, 0.0, 1.0]], dtype=torch.float64)
    columns = torch.tensor([[1.0], [2.0**-60], [2.0**-120]], dtype=torch.float64).expand(3, 6).contiguous()
    updates = [LowRankUpdate(columns, breath, 1.0)]
    assert same_bits(merge_weight(weight, updates, precision="exact"), correctly_rounded(weight, updates, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_rounding_first_would_be_wrong(dtype):
    """The value lies 2⁻³⁰ above a tie: float32 puts it on the tie, and the tie goes to even, which is down."""
    p = GRID[dtype][0]
    weight = torch.ones(1, 1, dtype=dtype)
    update = LowRankUpdate(torch.tensor([[2.0**-p], [2.0**-30]]), torch.ones(1, 2), 1.0)
    above = 1.0 + 2.0 ** (1 - p)
    assert merge_weight(weight, [update], precision="exact").item() == above
    assert merge_weight(weight, [update], precision="fast").item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_cancellation(dtype):
    """W and two large products that nearly cancel: what is left is far below the error of any wide sum."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 8, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(8, 1, generator=g)
    a = torch.randn(1, 8, generator=g)
    updates = [LowRankUpdate(a * 2.0**40, b * 2.0**40, 1.0), LowRankUpdate(a * 2.0**40, -b * 2.0**40, 1.0 + 2.0**-50)]
    expected = correctly_rounded(weight, updates, dtype)
    assert same_bits(merge_weight(weight, updates, precision="exact"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_range(dtype):
    """Overflow to infinity exactly from half a step above the largest number on; results below the normal numbers; zeros."""
    info = torch.finfo(dtype)
    last_step = (
        info.max * (1 - 1 / (1 + info.eps))
        if dtype == torch.float64
        else info.max
        - float(
            torch.tensor(info.max, dtype=dtype).nextafter(torch.tensor(0.0, dtype=dtype)) if dtype != torch.float16 else 65472.0
        )
    )
    sizes = [0.0, last_step * 0.49, last_step * 0.5, last_step * 0.51, -info.max, info.tiny * 0.75, info.tiny * info.eps * 0.3]
    weight = torch.tensor([[info.max, -info.max, 0.0, info.tiny, -info.tiny]], dtype=dtype).repeat(len(sizes), 1)
    update = LowRankUpdate(torch.ones(1, 5, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)[:, None], 1.0)
    assert same_bits(merge_weight(weight, [update], precision="exact"), correctly_rounded(weight, [update], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 64, 256])
def test_beside_ties_of_subnormal_numbers(dtype, r):
    """Half a step above a subnormal number, less or more a breath: float32's subnormal numbers are too coarse to tell."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps
    weight = torch.tensor([[info.tiny, -info.tiny, 3 * step, -step]], dtype=dtype).repeat(3, 1)
    lora_B = torch.zeros(3, r, dtype=torch.float64)
    lora_B[:, 0] = 1.0 if dtype == torch.float64 else step / 2  # of float64 half a step would be nothing
    lora_A = torch.ones(r, 4, dtype=torch.float64) * (step if dtype == torch.float64 else 1.0)
    lora_B[1, 0] *= 1 + 2.0**-30
    lora_B[2, 0] *= 1 - 2.0**-30
    updates = [LowRankUpdate(lora_A, lora_B, 1.0)]
    assert same_bits(merge_weight(weight, updates, precision="exact"), correctly_rounded(weight, updates, dtype))


def test_factors_beyond_float32():
    """Products that are ordinary numbers, of factors that float32 cannot hold."""
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    update = LowRankUpdate(torch.tensor([[1e-60, 3e-60]], dtype=torch.float64), torch.tensor([[2e60]], dtype=torch.float64), 1.0)
    assert same_bits(merge_weight(weight, [update], precision="exact"), correctly_rounded(weight, [update], torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_nan_stay_where_they_are(dtype):
    weight, updates = random_case(3, 4, 4, [2], dtype, torch.float32)
    weight[0, 0], weight[1, 1], weight[2, 2] = float("nan"), float("inf"), float("-inf")
    merged = merge_weight(weight, updates, precision="exact").double().numpy()
    finite = weight.clone()
    finite[0, 0] = finite[1, 1] = finite[2, 2] = 0.0
    expected = correctly_rounded(finite, updates, dtype)
    expected[0, 0], expected[1, 1], expected[2, 2] = np.nan, np.inf, -np.inf
    assert np.array_equal(merged, expected, equal_nan=True)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", DTYPES)
def test_into_another_dtype(source, target):
    weight, updates = random_case(9, 20, 30, [4], source, torch.float32)
    out = torch.empty(20, 30, dtype=target)
    assert merge_weight(weight, updates, out=out, precision="exact") is out
    assert same_bits(out, correctly_rounded(weight, updates, target))


def test_zero_update_gives_the_weight_back():
    weight = torch.randn(50, 60).bfloat16()
    assert torch.equal(
        merge_weight(weight, [LowRankUpdate(torch.randn(4, 60), torch.zeros(50, 4), 2.0)], precision="exact"), weight
    )

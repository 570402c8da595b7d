"""The kernel for GPUs gives the bits that the processor gives: run as C++ for small matrices, and where there is a GPU, on it."""

import ctypes
import itertools
import math

import pytest
import torch

from lorafold.kernel import cuda as gpu
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_measured, merge_rows, merge_weight
from lorafold.kernel.update import LowRankUpdate
from onprocessor import COMPILER, DTYPES, INTEGERS, OnGpu, OnProcessor


@pytest.fixture(scope="module", autouse=True)
def path():
    """Neither of the two that conftest.py has."""


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler, or not Linux")
    return OnProcessor(lambda: tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module", params=["processor", "gpu"])
def place(request):
    """Where the kernel runs."""
    if request.param == "processor":
        return request.getfixturevalue("processor")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return OnGpu()


def case(rows, columns, r, dtype, factor=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g) * 0.02).to(dtype)
    lora_A, lora_B = torch.randn(r, columns, generator=g) * 0.02, torch.randn(rows, r, generator=g) * 0.01
    return weight, lora_A.to(factor), lora_B.to(factor)


def same_bits(found, right):
    return torch.equal(found.cpu().contiguous().view(INTEGERS[found.dtype]), right.contiguous().view(INTEGERS[right.dtype]))


def put(place, update):
    return LowRankUpdate(place.put(update.lora_A), place.put(update.lora_B), update.scaling)


def merged(place, weight, updates, do=merge_weight, usual=True, **how):
    """By the kernel; `weight` is where it runs, `updates` are not."""
    with place.working(usual=usual):
        return do(weight, [put(place, update) for update in updates], **how)


def right_bits(place, weight, update, **how):
    return same_bits(merged(place, place.put(weight), [update], **how), merge_weight(weight, [update]))


on_gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "r"), [(1, 1, 1), (33, 130, 5), (40, 72, 16)])
def test_exact_has_the_bits_of_the_processor(place, dtype, factor, rows, columns, r):
    weight, lora_A, lora_B = case(rows, columns, r, dtype, factor)
    for scaling in (2.0, 0.3, -0.5, 2.0**20, 0.0):
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, scaling))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "r"), [(5, 296, 33), (66, 24, 64), (17, 40, 128)])
def test_of_higher_rank(place, dtype, rows, columns, r):
    weight, lora_A, lora_B = case(rows, columns, r, dtype)
    for scaling in (2.0, 0.3):
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, scaling))


@on_gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "r"), [(64, 64, 16), (300, 520, 33), (128, 72, 128), (17, 4096, 64)])
def test_large_ones(dtype, factor, rows, columns, r):
    test_exact_has_the_bits_of_the_processor(OnGpu(), dtype, factor, rows, columns, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_from_dtype_to_dtype_in_place_and_transposed(place, dtype, out):
    weight, lora_A, lora_B = case(24, 96, 8, dtype)
    update = LowRankUpdate(lora_A, lora_B, 2.0)
    right = merge_weight(weight, [update], out=torch.empty(24, 96, dtype=out))
    assert same_bits(merged(place, place.put(weight), [update], out=place.put(torch.empty(24, 96, dtype=out))), right)
    for first in (20, 16, 3):  # places that eight elements can be moved to at once, and not
        wide = place.put(torch.zeros(24, 136, dtype=out))
        merged(place, place.put(weight), [update], out=wide[:, first : first + 96])
        assert same_bits(wide[:, first : first + 96], right)
        assert not wide[:, :first].any()
        assert not wide[:, first + 96 :].any()
    if dtype == out:
        here = place.put(weight)
        merged(place, here, [update], out=here)
        assert same_bits(here, right)
        turned = place.put(weight).T.contiguous().T
        assert same_bits(merged(place, turned, [update], out=turned), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_of_a_matrix(place, dtype):
    weight, lora_A, lora_B = case(50, 72, 8, dtype)
    update = LowRankUpdate(lora_A, lora_B, 0.3)
    right, here = merge_weight(weight, [update]), place.put(weight)
    factors = stack([put(place, update)])
    with place.working():
        for rows in (slice(0, 7), slice(7, 40), slice(40, 50)):
            merge_rows(here[rows], factors, rows.start, out=here[rows], precision="exact")
    assert same_bits(here, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_updates_in_any_order(place, dtype):
    weight, *_ = case(24, 40, 4, dtype)
    updates = [LowRankUpdate(*case(24, 40, r, dtype, factor, seed=r)[1:], s) for r, factor, s in VARIED]
    right, fast = merge_weight(weight, updates), merged(place, place.put(weight), updates, precision="fast").cpu()
    for order in itertools.islice(itertools.permutations(updates), 0, None, 5):
        assert same_bits(merged(place, place.put(weight), order), right)
        assert same_bits(merged(place, place.put(weight), order, precision="fast"), fast)


VARIED = [(4, torch.float32, 2.0), (9, torch.bfloat16, 0.1), (3, torch.float16, -1.0), (17, torch.float32, 2.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_what_is_not_a_usual_number(place, dtype, scaling):
    weight, lora_A, lora_B = case(32, 104, 16, dtype)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3] = math.nan, math.inf, -math.inf, 0.0
    weight[4] = -0.0
    lora_B[4], lora_B[5], lora_B[6] = 0.0, 1e-30, 3e38 if dtype == torch.float32 else 1e30
    lora_B[7, 3], lora_B[8, 2], lora_A[5, 77] = math.nan, math.inf, math.inf
    lora_A[:, 9], lora_A[:, 10], lora_B[9], lora_B[10] = 1e-38, 2e-42, 1e-20, 1e-44
    weight[11], weight[12] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    update = LowRankUpdate(lora_A, lora_B, scaling)
    assert right_bits(place, weight, update, usual=False)
    right, fast = merge_weight(weight, [update]), merged(place, place.put(weight), [update], usual=False, precision="fast").cpu()
    assert torch.equal(fast.isnan(), right.isnan())
    assert torch.equal(fast.isinf(), right.isinf())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-40, -20, 20, 40])
def test_all_sizes(place, dtype, exponent):
    """Rows and columns of sizes as far apart as slices are made for, and farther."""
    weight, lora_A, lora_B = case(24, 72, 20, dtype)
    lora_B *= 2.0 ** torch.arange(-12, 12)[:, None] * 2.0**exponent
    lora_A *= 2.0 ** torch.linspace(-12, 12, 72).round()
    lora_A[:, 30:40] = 0.0
    weight *= 2.0 ** torch.randint(-6, 6, (24, 1), generator=torch.Generator().manual_seed(0))
    for scaling in (2.0**-10, -0.7):
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, scaling), usual=abs(exponent) < 30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties(place, dtype):
    g = torch.Generator().manual_seed(1)
    half = torch.finfo(dtype).eps / 2
    weight = torch.ones(40, 64).to(dtype) * torch.randint(1, 4, (40, 64), generator=g).to(dtype)
    lora_A = torch.randint(-2, 3, (4, 64), generator=g).float()
    lora_B = torch.randint(-2, 3, (40, 4), generator=g).float() * half
    for nudge in (0.0, half * 2.0**-30, -half * 2.0**-60):
        lora_A[0], lora_B[:, 0] = 1.0, nudge
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2.0**10, 2.0**30])
def test_large_products_that_cancel(place, dtype, size):
    weight, lora_A, lora_B = case(24, 40, 8, dtype)
    lora_A[6], lora_B[:, 6] = lora_A[3] * size, lora_B[:, 3] * size
    lora_A[7], lora_B[:, 7] = lora_A[6], -lora_B[:, 6]
    for scaling in (1.0, 0.3):
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, scaling))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_zero(place, dtype):
    """Is +0, whatever signs its terms have."""
    weight, lora_A, lora_B = torch.zeros(20, 40).to(dtype), torch.zeros(3, 40), torch.ones(20, 3)
    weight[1::2] = -0.0
    lora_B[2:4], lora_B[4:6] = 0.0, -0.0
    lora_A[0, 8:16] = torch.tensor([0.5, -0.25] * 4)
    lora_A[1, 8:16] = -lora_A[0, 8:16]
    for scaling in (1.0, -0.5, -0.7, 0.0):
        assert right_bits(place, weight, LowRankUpdate(lora_A, lora_B, scaling))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_is_within_a_step_and_measured_is_the_same(place, dtype):
    weight, lora_A, lora_B = case(72, 328, 16, dtype)
    update = LowRankUpdate(lora_A, lora_B, 2.0)
    right = merge_weight(weight, [update])
    fast = merged(place, place.put(weight), [update], precision="fast").cpu()
    # float32 keeps each of the sums to 2^-23 of its terms, which are no larger than |W| + R · max|sB| · max|A|: less than 0.2 here
    assert ((fast.double() - right.double()).abs() <= torch.finfo(dtype).eps * right.double().abs() + 2.0**-23 * 0.2).all()
    found, kept = merged(place, place.put(weight), [update], do=merge_measured)
    expected = merge_measured(weight, [update])[1]
    assert same_bits(found, right)
    # products of float32 numbers, summed in float32 by a few hundred at a time; open elements count as their lower end has it
    assert kept.dot == pytest.approx(expected.dot, rel=1e-3)
    assert kept.square == pytest.approx(expected.square, rel=1e-3)


# --- what stands in for a GPU


@pytest.fixture(scope="module")
def library(processor):
    return processor.code(gpu.Variant(*DTYPES, 16, exact=True, wide=False, measured=False, aligned=True)).library


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
def test_halves_are_those_of_torch(library, kind, dtype):
    g = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    any_ = torch.randint(-(2**31), 2**31, (200_000,), generator=g).to(torch.int32).view(torch.float32)
    middles = (every[:-1].double() + every[1:].double()).div(2).float()[:-1]
    small = torch.randn(100_000, generator=g) * 2.0 ** torch.randint(-30, 17, (100_000,), generator=g)
    numbers = torch.cat([every.float(), any_, middles, small])
    found = torch.empty(len(numbers), dtype=dtype)
    library.pack(kind, ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(found.data_ptr()), len(numbers) // 2)
    a_nan = numbers.isnan()
    assert same_bits(found[~a_nan], numbers[~a_nan].to(dtype))
    assert found[a_nan].isnan().all()
    if dtype == torch.float16:
        library.widen.restype = ctypes.c_float
        wide = torch.tensor([library.widen(half & 0xFFFF) for half in range(-(2**15), 2**15)])
        assert torch.equal(wide.nan_to_num(7.0), every.float().nan_to_num(7.0))

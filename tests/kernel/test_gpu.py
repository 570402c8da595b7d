"""The kernel on a GPU: its arithmetic on the processor, that it compiles for every GPU, and where there is one, its bits."""

import ctypes
import itertools
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import gpu, merge_measured, merge_weight
from lorafold.kernel.gpu.nvrtc import CompilerError
from lorafold.update import LowRankUpdate

TARGETS = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(scope="module", autouse=True)
def path():
    """Neither of the two that conftest.py has."""


# --- the arithmetic of one element, compiled for the processor


@pytest.fixture(scope="module")
def element(tmp_path_factory):
    """By dtype, what settles one element."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("element")
    source = folder / "element.cpp"
    source.write_text(
        f"""#include "{Path(gpu.__file__).with_name("element.h")}"
        struct Given {{
            const double *s, *b, *a;
            double scaling(int k) const {{ return s[k]; }}
            double B(int k) const {{ return b[k]; }}
            double A(int k) const {{ return a[k]; }}
        }};
        extern "C" u32 round_one(double x) {{ return rounded(x); }}
        extern "C" u32 settle_one(double w, int r, const double *s, const double *b, const double *a) {{
            return settled(w, r, Given{{s, b, a}});
        }}
        """
    )
    found = {}
    for kind, dtype in enumerate(TARGETS):
        made = folder / f"element{kind}.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", f"-DTARGET={kind}", source, "-o", made], check=True)
        found[dtype] = ctypes.CDLL(str(made))
        for function in (found[dtype].round_one, found[dtype].settle_one):
            function.restype = ctypes.c_uint32
        found[dtype].round_one.argtypes = [ctypes.c_double]
    return found


def bits(x):
    """Of a tensor of one number."""
    return int(x.view(INTEGERS[x.dtype])) & (0xFFFFFFFF if x.dtype == torch.float32 else 0xFFFF)


def numbers(array):
    return (ctypes.c_double * len(array))(*array)


@pytest.mark.parametrize("dtype", TARGETS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_number_is_rounded_once(element, dtype, data):
    x = data.draw(st.floats(width=32) | st.floats() | st.integers(-(2**17), 2**17).map(lambda n: math.ldexp(n, -20 - n % 120)))
    x = math.nan if math.isnan(x) else x  # without a sign
    ordinary = math.isfinite(x) and x != 0
    assert element[dtype].round_one(x) == (rounded(Fraction(x), dtype) if ordinary else bits(torch.tensor(x, dtype=dtype)))


HELD = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.integers(-40, 40).map(float)


@pytest.mark.parametrize("dtype", TARGETS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_element_is_the_rounded_real_sum(element, dtype, data):
    r = data.draw(st.integers(1, 5))
    each = data.draw(st.sampled_from([HELD, SMALL, st.floats(-1, 1, width=16)]))
    b, a = (data.draw(st.lists(each, min_size=r, max_size=r)) for _ in "ba")
    s = data.draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, 1 / 3, -0.7, 2.0**-40, 2.0**40, 0.0]), min_size=r, max_size=r))
    products = sum(Fraction(x) * Fraction(y) * Fraction(z) for x, y, z in zip(s, b, a, strict=True))
    # next to a middle between two numbers of the dtype, as often as not
    near = float(data.draw(st.sampled_from([torch.tensor(0.0), torch.tensor(1.0).to(dtype), torch.tensor(-0.3).to(dtype)])))
    step = 2.0 ** (-data.draw(st.sampled_from([8, 9, 11, 12, 24, 25, 30])))
    w = data.draw(st.just(near) | st.just(near + step) | HELD)
    w = torch.tensor(w - float(products) if data.draw(st.booleans()) else w, dtype=torch.float32).item()
    if not math.isfinite(w):
        w = 1.0
    found = element[dtype].settle_one(ctypes.c_double(w), r, numbers(s), numbers(b), numbers(a))
    assert found == rounded(Fraction(w) + products, dtype)


def rounded(x, dtype):
    """The bits of a fraction rounded to nearest, ties to even; a zero is +0."""
    info = torch.finfo(dtype)
    mantissa, smallest = -round(math.log2(info.eps)), round(math.log2(info.tiny))
    size, width = abs(x), 8 * dtype.itemsize
    if size == 0:
        return 0
    exponent = max(smallest, size.numerator.bit_length() - size.denominator.bit_length())
    if exponent > smallest and Fraction(2) ** exponent > size:
        exponent -= 1
    whole = round(size / Fraction(2) ** (exponent - mantissa))  # Python rounds to even
    infinite = bits(torch.tensor(math.inf, dtype=dtype))
    magnitude = min(infinite, ((exponent - smallest) << mantissa) + whole)
    return magnitude | (x < 0) << (width - 1)


# --- the whole kernel


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize(("rank", "wide"), [(16, False), (64, False), (128, False), (16, True), (128, True)])
def test_it_compiles(capability, rank, wide):
    target = 2 if wide else 0
    try:
        code = gpu.machine_code(capability, target, target, 2, rank, True, wide, True, False)
    except CompilerError as error:
        if "was not found" in str(error):
            pytest.skip("no NVRTC, the compiler of NVIDIA: torch brings it where it is built for CUDA")
        raise
    assert code[:4] == b"\x7fELF"


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def case(rows, columns, r, dtype, factor=torch.float32, seed=0, scale=0.02):
    g = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=g) * 0.02).to(dtype)
    lora_A, lora_B = torch.randn(r, columns, generator=g) * scale, torch.randn(rows, r, generator=g) * 0.01
    return weight, lora_A.to(factor), lora_B.to(factor)


def same_bits(found, right):
    return torch.equal(found.cpu().contiguous().view(INTEGERS[found.dtype]), right.contiguous().view(INTEGERS[right.dtype]))


def on_gpu(update):
    return LowRankUpdate(update.lora_A.cuda(), update.lora_B.cuda(), update.scaling)


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("factor", TARGETS)
@pytest.mark.parametrize(
    ("rows", "columns", "r"), [(64, 64, 16), (1, 1, 1), (33, 130, 5), (300, 520, 33), (128, 72, 128), (17, 4096, 64)]
)
def test_exact_has_the_bits_of_the_processor(dtype, factor, rows, columns, r):
    for scaling in (2.0, 0.3, -0.5, 2.0**20, 0.0):
        weight, lora_A, lora_B = case(rows, columns, r, dtype, factor)
        update = LowRankUpdate(lora_A, lora_B, scaling)
        assert gpu_used(weight.cuda(), [on_gpu(update)])
        assert same_bits(merge_weight(weight.cuda(), [on_gpu(update)]), merge_weight(weight, [update]))


def gpu_used(weight, updates):
    from lorafold.kernel import stack

    return gpu.merge_gpu(weight, torch.empty_like(weight), stack(updates), precision="exact", measured=False) is not None


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("out", TARGETS)
def test_from_dtype_to_dtype_in_place_and_transposed(dtype, out):
    weight, lora_A, lora_B = case(96, 160, 8, dtype)
    update = LowRankUpdate(lora_A, lora_B, 2.0)
    right = merge_weight(weight, [update], out=torch.empty(96, 160, dtype=out))
    assert same_bits(merge_weight(weight.cuda(), [on_gpu(update)], out=torch.empty(96, 160, dtype=out, device="cuda")), right)
    wide = torch.zeros(96, 200, dtype=out, device="cuda")
    merge_weight(weight.cuda(), [on_gpu(update)], out=wide[:, 20:180])
    assert same_bits(wide[:, 20:180], right)
    assert not wide[:, :20].any()
    assert not wide[:, 180:].any()
    if dtype == out:
        place = weight.cuda()
        merge_weight(place, [on_gpu(update)], out=place)
        assert same_bits(place, right)
        turned = weight.cuda().T.contiguous().T
        assert same_bits(merge_weight(turned, [on_gpu(update)], out=turned), right)


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
def test_several_updates_in_any_order(dtype):
    weight, *_ = case(80, 96, 4, dtype)
    updates = [LowRankUpdate(*case(80, 96, r, dtype, factor, seed=r)[1:], s) for r, factor, s in itertools.islice(VARIED, 4)]
    right = merge_weight(weight, updates)
    for order in itertools.permutations(updates):
        assert same_bits(merge_weight(weight.cuda(), [on_gpu(update) for update in order]), right)
        assert same_bits(
            merge_weight(weight.cuda(), [on_gpu(u) for u in order], precision="fast"),
            merge_weight(weight.cuda(), [on_gpu(u) for u in updates], precision="fast").cpu(),
        )


VARIED = [(4, torch.float32, 2.0), (9, torch.bfloat16, 0.1), (3, torch.float16, -1.0), (17, torch.float32, 2.0)]


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
def test_what_is_not_a_usual_number(dtype):
    weight, lora_A, lora_B = case(64, 128, 16, dtype)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3] = math.nan, math.inf, -math.inf, 0.0
    weight[4] = -0.0
    lora_B[4], lora_B[5], lora_B[6] = 0.0, 1e-30, 3e38 if dtype == torch.float32 else 1e30
    lora_B[7, 3], lora_B[8, 2], lora_A[5, 77] = math.nan, math.inf, math.inf
    lora_A[:, 9], lora_A[:, 10], lora_B[9], lora_B[10] = 1e-38, 2e-42, 1e-20, 1e-44
    weight[11], weight[12] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    for scaling in (1.0, 0.7):
        update = LowRankUpdate(lora_A, lora_B, scaling)
        assert same_bits(merge_weight(weight.cuda(), [on_gpu(update)]), merge_weight(weight, [update]))


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
def test_ties(dtype):
    g = torch.Generator().manual_seed(1)
    half = torch.finfo(dtype).eps / 2
    weight = torch.ones(64, 96).to(dtype) * torch.randint(1, 4, (64, 96), generator=g).to(dtype)
    lora_A = torch.randint(-2, 3, (4, 96), generator=g).float()
    lora_B = torch.randint(-2, 3, (64, 4), generator=g).float() * half
    for nudge in (0.0, half * 2.0**-30, -half * 2.0**-60):
        lora_A[0], lora_B[:, 0] = 1.0, nudge
        update = LowRankUpdate(lora_A, lora_B, 1.0)
        assert same_bits(merge_weight(weight.cuda(), [on_gpu(update)]), merge_weight(weight, [update]))


@cuda
@pytest.mark.parametrize("dtype", TARGETS)
def test_fast_is_within_a_step_and_measured_is_the_same(dtype):
    weight, lora_A, lora_B = case(200, 328, 16, dtype)
    update = LowRankUpdate(lora_A, lora_B, 2.0)
    right = merge_weight(weight, [update])
    fast = merge_weight(weight.cuda(), [on_gpu(update)], precision="fast").cpu()
    # float32 keeps each of the sums to 2^-23 of its terms, which are no larger than |W| + R · max|sB| · max|A|: less than 0.2 here
    assert ((fast.double() - right.double()).abs() <= torch.finfo(dtype).eps * right.double().abs() + 2.0**-23 * 0.2).all()
    merged, kept = merge_measured(weight.cuda(), [on_gpu(update)])
    expected = merge_measured(weight, [update])[1]
    assert same_bits(merged, right)
    # products of float32 numbers, summed in float32 by a few hundred at a time; open elements count as their lower end has it
    assert kept.dot == pytest.approx(expected.dot, rel=1e-3)
    assert kept.square == pytest.approx(expected.square, rel=1e-3)

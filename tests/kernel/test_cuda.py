"""The kernel for GPUs: its arithmetic of one element on the processor, and that it compiles for every GPU."""

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

from lorafold.kernel import cuda as gpu
from lorafold.kernel.cuda.nvrtc import CompilerError
from onprocessor import DTYPES, INTEGERS


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
    for kind, dtype in enumerate(DTYPES):
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


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_number_is_rounded_once(element, dtype, data):
    x = data.draw(st.floats(width=32) | st.floats() | st.integers(-(2**17), 2**17).map(lambda n: math.ldexp(n, -20 - n % 120)))
    x = math.nan if math.isnan(x) else x  # without a sign
    ordinary = math.isfinite(x) and x != 0
    assert element[dtype].round_one(x) == (rounded(Fraction(x), dtype) if ordinary else bits(torch.tensor(x, dtype=dtype)))


HELD = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.integers(-40, 40).map(float)


@pytest.mark.parametrize("dtype", DTYPES)
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


# --- the whole kernel; test_gpu_merge.py runs it


# for every GPU, and for one of them with what needs the most registers
COMPILED = [*itertools.product([(8, 0), (9, 0), (10, 0)], [16], [False, True]), ((9, 0), 128, False), ((9, 0), 128, True)]


@pytest.mark.parametrize(("capability", "rank", "wide"), COMPILED)
def test_it_compiles(capability, rank, wide):
    target = torch.float32 if wide else torch.bfloat16
    variant = gpu.Variant(target, target, torch.float32, rank, exact=True, wide=wide, measured=True, aligned=False)
    try:
        code = gpu.machine_code(capability, variant)
    except CompilerError as error:
        if "was not found" in str(error):
            pytest.skip("no NVRTC, the compiler of NVIDIA: torch brings it where it is built for CUDA")
        raise
    assert code[:4] == b"\x7fELF"

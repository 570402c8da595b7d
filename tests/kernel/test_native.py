"""Every build of the compiled kernel gives the bits that torch gives, whatever the shape, strides, dtypes and numbers."""

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import rounding
from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu import loader as compiled
from lorafold.kernel.cpu import parallel
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_measured, merge_weight
from lorafold.kernel.rounding import Stochastic
from lorafold.kernel.update import LowRankUpdate
from oracle import correctly_rounded, same_bits

BUILDS = compiled.builds()
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
pytestmark = pytest.mark.skipif(not BUILDS, reason="no compiled kernel here")
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)


@pytest.fixture(scope="module", params=["both"], autouse=True)
def path():
    """These tests compare the two themselves."""


@contextmanager
def using(build):
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, rounding):
            patch.setattr(module, "build", lambda: build)
        yield


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def numbers(g, shape, dtype, kind):
    """Weights of ordinary size, of the ends of the range, or with zeros of both signs, infinities and NaN among them."""
    x = torch.randn(shape, generator=g, dtype=torch.float64) * 0.02
    pick = torch.randint(0, 8, shape, generator=g)
    info = torch.finfo(dtype)
    if kind == "special":
        for i, value in enumerate([0.0, -0.0, float("inf"), float("-inf"), float("nan")]):
            x[pick == i] = value
    elif kind == "ends":
        for i, value in enumerate([info.max, -info.max, info.tiny, -info.tiny, info.tiny * info.eps, info.tiny * 0.75]):
            x[pick == i] = value
    elif kind == "powers":  # and so the sums lie on ties
        x = torch.ldexp(torch.sign(x), pick - 4)
    return x.to(dtype)


def update(g, rows, columns, r, kind, size):
    a, b = torch.randn(r, columns, generator=g) * 0.05, torch.randn(rows, r, generator=g) * size
    if kind == "powers":
        a, b = torch.sign(a), torch.sign(b) * 2.0**-8
    if kind == "special":
        a[:, ::3], b[::2] = 0.0, 0.0
    if kind == "ends":
        a, b = a * 2.0**-60, b * 2.0**-60
    return LowRankUpdate(a, b, 1.0 if kind == "powers" else 0.7)


def strided(x, how):
    """The same matrix, its rows apart, or stored by columns."""
    if how == "rows apart":
        room = torch.zeros(x.shape[0], x.shape[1] + 3, dtype=x.dtype)
        room[:, : x.shape[1]] = x
        return room[:, : x.shape[1]]
    return x.T.contiguous().T if how == "by columns" else x


MATRICES = {
    "seed": st.integers(0, 2**31),
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 70),
    "kind": st.sampled_from(["ordinary", "special", "ends", "powers"]),
    "size": st.sampled_from([1e-4, 0.05, 3.0]),
    "how": st.sampled_from(["contiguous", "rows apart", "by columns"]),
}


@every_build
@settings(max_examples=120, deadline=None)
@given(
    **MATRICES,
    r=st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 130, 256]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    in_place=st.booleans(),
)
def test_same_bits_as_torch(build, seed, rows, columns, r, source, target, kind, size, how, in_place):
    g = torch.Generator().manual_seed(seed)
    weight = strided(numbers(g, (rows, columns), source, kind), how)
    updates = [update(g, rows, columns, r, kind, size)]

    def merged(build):
        start = strided(weight.clone(), how)
        out = start if in_place and source == target else strided(torch.empty(rows, columns, dtype=target), how)
        with using(build):
            return merge_measured(start, updates, out=out, precision="exact")

    (expected, kept), (found, inner) = merged(None), merged(build)
    assert torch.equal(bits(found), bits(expected))
    if kind == "ordinary":  # float32 sums of at most 2800 products each, on either path: see test_merge
        assert inner.square == pytest.approx(kept.square, rel=3.4e-4)
        moved = float((expected.double() - weight.double()).norm())
        assert inner.dot == pytest.approx(kept.dot, abs=3.4e-4 * moved * kept.square**0.5 + 1e-300)


@every_build
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(("source", "target"), [(s, t) for s in DTYPES for t in DTYPES])
def test_which_dtypes_it_does(build, source, target, precision):
    """All; the test above would not notice if nothing were compiled."""
    weight = torch.randn(5, 9).to(source)
    factors = stack([LowRankUpdate(torch.randn(2, 9), torch.randn(5, 2), 1.0)])
    with using(build):
        assert native.merge_native(weight, torch.empty(5, 9, dtype=target), factors, precision=precision) is not None


@every_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("threads", "whose"), [(1, "nobody's"), (2, "torch's"), (2, "ours")])
@pytest.mark.parametrize("kind", ["ordinary", "powers"])
def test_chunks_and_threads_change_nothing(build, dtype, threads, whose, kind, monkeypatch):
    if whose == "ours":
        monkeypatch.setattr(parallel, "_parallel", lambda: None)
    monkeypatch.setattr(native, "_CHUNK", 3000)
    monkeypatch.setattr(native, "_ALONE", 1000)
    monkeypatch.setattr(native, "_ROOM", 1)
    monkeypatch.setattr(native, "_MANY", 5000)
    g = torch.Generator().manual_seed(3)
    weight, updates = numbers(g, (101, 203), dtype, kind), [update(g, 101, 203, 20, kind, 0.05)]
    with using(None):
        expected, kept = merge_measured(weight, updates, precision="exact")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with using(build):
            found, inner = merge_measured(weight, updates, precision="exact")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(found), bits(expected))
    assert inner.share == pytest.approx(kept.share, abs=1e-3)


def test_torchs_threads_are_found():
    """Where torch is built with OpenMP for Linux, as its wheels are, its threads do the work."""
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert parallel._parallel() is not None


@every_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 9])
def test_sums_beside_ties(build, dtype, r):
    """Halves of a last bit, and what lies 2⁻¹ to 2⁻⁶⁰ of that beside them, from either side, at the ends of a power of two too."""
    step = torch.finfo(dtype).eps
    each = torch.tensor([1.0, 1 + step, 2 - step, 2 - 2 * step, -1.0, step / 4, 0.0, 2.0**-126], dtype=dtype)
    weight = each.repeat(3)[:, None].repeat(1, 244)
    near = torch.tensor([sign * 2.0**-k for sign in (-1, 1) for k in range(1, 61)] + [0.0, 1.0], dtype=torch.float64)
    a = torch.zeros(r, 244, dtype=torch.float64)
    a[-1] = torch.cat([1 + near, -1 - near])
    b = torch.full((24, r), step / 2, dtype=torch.float64)
    b[8:16] /= 2
    b[16:] *= 2.0**-100
    for lora_A in (a, a.float()):  # float32 does not hold the first
        updates = [LowRankUpdate(lora_A, b, 1.0)]
        with using(None):
            expected = merge_weight(weight, updates, precision="exact")
        with using(build):
            assert torch.equal(bits(merge_weight(weight, updates, precision="exact")), bits(expected))


def _losing(large, tie, unit):
    """Products of which wide sums, where `unit` is a last bit of those as `large` as `large`, lose that they lie beyond a `tie`."""
    beside = unit / 2 + unit / 16  # rounded to a whole unit, sixteen times
    return [large, tie, *[-beside] * 16, 16 * beside + unit / 256, -large]


CANCELLING = {
    "far off": {
        torch.bfloat16: [2.0**15, 1 + 2.0**-8 + 2.0**-20, -(2.0**15)],
        torch.float16: [2.0**12, 1 + 2.0**-11 + 2.0**-20, -(2.0**12)],
        torch.float32: [2.0**30, 1 + 2.0**-24 + 2.0**-45, -(2.0**30)],
        torch.float64: [2.0**60, 1.0, 2.0**-53 + 2.0**-90, -(2.0**60)],
    },
    "beside the tie": {
        torch.bfloat16: _losing(2.0**3, 1 + 2.0**-8, 2.0**-20),
        torch.float16: _losing(2.0**3, 1 + 2.0**-11, 2.0**-20),
        torch.float32: _losing(2.0**5, 1 + 2.0**-24, 2.0**-47),
        torch.float64: [2.0**60, 1.0, 2.0**-53, 2.0**-107, -(2.0**60)],  # what float64 lost of the sum is 1, and no more
    },
}


@every_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", CANCELLING)
@pytest.mark.parametrize("sign", [1, -1])
def test_products_that_cancel(build, dtype, how, sign):
    """The sum is right above a tie, which neither its size nor its lost bits tell: only the bound does."""
    products = torch.tensor(CANCELLING[how][dtype], dtype=torch.float64)[:, None] * sign
    factors = LowRankUpdate(products.repeat(1, 40), torch.ones(9, len(products), dtype=torch.float64), 1.0)
    for used in (build, None):
        with using(used):
            merged = merge_weight(torch.zeros(9, 40, dtype=dtype), [factors], precision="exact")
        assert (merged == sign * (1 + torch.finfo(dtype).eps)).all()


@every_build
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    short=st.booleans(),
    scaling=st.sampled_from([1.0, 2.0**-3, 0.7, 16 / 3]),
    r=st.integers(1, 24),
    beside=st.integers(20, 400),
)
def test_what_float64_leaves_undecided_is_summed_without_error(build, seed, dtype, short, scaling, r, beside):
    """Ties but for products that cancel, and one that is some 2^-20 to 2^-400 of them, or nothing. None is left over."""
    g = torch.Generator().manual_seed(seed)
    factor = torch.float16 if short else torch.float64
    half, columns = torch.randn(9, r, generator=g).to(factor).double(), torch.randn(r, 33, generator=g).to(factor).double()
    rest = torch.randint(-1, 2, (1, 33), generator=g) * 2.0 ** -(beside / 2)
    weight = torch.randn(9, 33, generator=g).to(dtype)
    tie = torch.full((1, 33), torch.finfo(dtype).eps / 2, dtype=torch.float64)  # of numbers from 1 to 2
    lora_A = torch.cat([columns, tie, -columns, rest])
    lora_B = torch.cat(
        [half, torch.full((9, 1), 1 / scaling if scaling < 1 else 1.0), half, torch.full((9, 1), 2.0 ** -(beside / 2))], 1
    )
    updates = [LowRankUpdate(lora_A, lora_B.double(), scaling)]
    with pytest.MonkeyPatch.context() as patch, using(build):
        patch.setattr(native, "settle", None)
        merged = merge_weight(weight, updates, precision="exact")
    assert same_bits(merged, correctly_rounded(weight, updates, dtype))


@every_build
def test_what_underflow_may_spoil_is_left_over(build, monkeypatch):
    """A product of 2^-1000 beside a tie: fractions say which side it is on."""
    left, settle = [], native.settle
    monkeypatch.setattr(native, "settle", lambda places, *rest: (left.append(len(places)), settle(places, *rest))[1])
    tiny = LowRankUpdate(
        torch.full((1, 7), 2.0**-500, dtype=torch.float64), torch.full((5, 1), 2.0**-500, dtype=torch.float64), 1.0
    )
    weight = torch.full((5, 7), 1 + 2.0**-8)
    with using(build):
        merged = merge_weight(weight, [tiny], out=torch.empty(5, 7, dtype=torch.bfloat16), precision="exact")
    assert (merged == 1 + 2.0**-7).all()
    assert left == [35]
    b = torch.tensor([[2.0**-500, 2.0**447]], dtype=torch.float64).repeat(5, 1)
    both = LowRankUpdate(torch.full((2, 7), 2.0**-500, dtype=torch.float64), b, 1.0)
    with using(build):
        merged = merge_weight(torch.ones(5, 7, dtype=torch.float64), [both], precision="exact")
    assert (merged == 1 + 2.0**-52).all()
    assert left == [35, 35]


FACTORS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
LAID = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "apart": lambda x: torch.stack([x, x], dim=2)[:, :, 0],
    "negated": lambda x: torch._neg_view(-x),
}


@every_build
@pytest.mark.parametrize(
    ("dtype", "laid"), [(d, laid) for d in FACTORS for laid in LAID if (d, laid) != (torch.float8_e4m3fn, "negated")]
)
@pytest.mark.parametrize("shape", [(8, 32), (19, 45), (3, 5)])
def test_factors_of_any_dtype_however_they_lie(build, dtype, laid, shape):
    """Read element by element by the compiled code, as torch reads them."""
    g = torch.Generator().manual_seed(7)
    lora_A, lora_B = torch.randn(6, shape[1], generator=g).to(dtype), (torch.randn(shape[0], 6, generator=g) * 0.1).to(dtype)
    updates = [LowRankUpdate(LAID[laid](lora_A), LAID[laid](lora_B), 0.3)]
    for target in DTYPES:
        weight = torch.randn(shape, generator=g).to(target)
        with using(None):
            expected = merge_weight(weight, updates)
        with using(build):
            assert torch.equal(bits(merge_weight(weight, updates)), bits(expected))
            merged = merge_weight(weight, updates, precision="fast")
        room = 20 * torch.finfo(torch.float32).eps + torch.finfo(target).eps  # the sum's roundings, and a last bit of the result
        assert torch.allclose(merged.double(), expected.double(), rtol=room, atol=room)


@every_build
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_side_made_ready(build, wide):
    """Blocks, norms and the scaled numbers, against numpy's."""
    rng = np.random.default_rng(3)
    matrix, scaling, weights = rng.normal(size=(21, 5)), rng.normal(size=5), rng.uniform(1, 9, size=5)
    tensors = [torch.from_numpy(each) for each in (matrix, scaling, weights)]
    ready = build.ready(*tensors, 8, wide, keep=True)
    scaled = matrix * scaling
    assert np.array_equal(ready.scaled.numpy(), scaled)
    whole = np.concatenate([scaled, np.zeros((3, 5))]).reshape(3, 8, 5).transpose(0, 2, 1)
    assert torch.equal(ready.packed, torch.from_numpy(whole.copy()).to(wide))
    norms = np.sqrt((np.longdouble(scaled) ** 2 * weights).sum(axis=1))
    assert (ready.norms.numpy() >= norms).all()  # they are a bound
    assert (ready.norms.numpy() <= norms * (1 + 2.0**-39)).all()
    assert build.ready(*tensors, 8, wide).scaled.numel() == 0


@every_build
def test_elements_beside_the_matrix_stay(build):
    room = torch.full((20, 40), 7.0, dtype=torch.bfloat16)
    inside = room[3:14, 5:28]
    with using(build):
        merge_weight(inside, [LowRankUpdate(torch.ones(2, 23), torch.ones(11, 2), 1.0)], out=inside, precision="exact")
    assert (inside == 9.0).all()
    inside.fill_(7.0)
    assert (room == 7.0).all()


@every_build
@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 2**40), count=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_draws_the_same_numbers(build, start, count, seed):
    noise = Stochastic(seed, "w", start)
    with using(None):
        expected = rounding._uniform(count, noise, torch.device("cpu"))
    with using(build):
        assert torch.equal(rounding._uniform(count, noise, torch.device("cpu")), expected)


def test_autograd_sees_the_change():
    """A weight that changed in place after a forward pass must not be used by the backward pass unnoticed."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    loss = (torch.randn(8, 8, requires_grad=True) @ weight).sum()
    merge_weight(weight, [LowRankUpdate(torch.ones(1, 8), torch.ones(8, 1), 1.0)], out=weight, precision="exact")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_left_to_torch(precision):
    def done(weight, factors):
        return native.merge_native(weight, weight, factors, precision=precision) is not None

    factors = stack([LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0)])
    plain = torch.zeros(3, 4)
    assert done(plain, factors)
    assert done(plain.double(), factors)
    assert not done(plain.to(torch.float8_e4m3fn), factors)
    assert not done(plain[:, ::2], stack([LowRankUpdate(torch.ones(1, 2), torch.ones(3, 1), 1.0)]))
    assert not done(plain.to("meta"), factors)
    a, b = torch.full((1, 4), 1e200, dtype=torch.float64), torch.full((3, 1), 1e200, dtype=torch.float64)
    assert done(plain, stack([LowRankUpdate(a, b, 1.0)])) == (precision == "fast")
    with using(None):
        assert not done(plain, factors)


@every_build
@settings(max_examples=120, deadline=None)
@given(
    **MATRICES,
    r=st.sampled_from([1, 7, 8, 9, 16, 33, 130]),
    dtypes=st.sampled_from([(s, t) for s in DTYPES for t in DTYPES if s == t or torch.float32 in (s, t)]),
)
def test_fast_is_a_sum_in_float32_rounded_once(build, seed, rows, columns, r, dtypes, kind, size, how):
    g = torch.Generator().manual_seed(seed)
    source, target = dtypes
    weight = strided(numbers(g, (rows, columns), source, kind), how)
    change = update(g, rows, columns, r, kind, size)
    with using(build):
        found, kept = merge_measured(weight, [change], out=strided(torch.empty(rows, columns, dtype=target), how), precision="fast")
        pieces = [
            merge_weight(
                weight[i : i + 1].contiguous(),
                [change.narrow(0, i, 1)],
                out=torch.empty(1, columns, dtype=target),
                precision="fast",
            )
            for i in range(rows)
        ]
    if how != "by columns":  # then the transpose is merged, and scaling is multiplied into the other factor
        assert torch.equal(bits(torch.cat(pieces)), bits(found))  # whatever the cut
    wide, a, b = weight.double(), change.lora_A.double(), change.lora_B.double() * change.scaling
    # the roundings of the scaled B and of A, a product, r additions and the last sum: each is off by u = 2^-24 of what it is given
    bound = (r + 5) * 2.0**-24 * (wide.abs() + b.abs() @ a.abs()) + r * 2.0**-148
    bound[~wide.isfinite()] = 0.0
    low, high = (rounding.to_nearest(wide + b @ a + sign * bound, target) for sign in (-1, 1))
    assert torch.equal(found.isnan(), low.isnan())
    sound = ~found.isnan()
    assert (low[sound] <= found[sound]).all()
    assert (found[sound] <= high[sound]).all()
    if kind == "powers":  # sums of few bits, with nothing to round before the end: ties are decided as everywhere
        assert torch.equal(bits(found), bits(merge_weight(weight, [change], out=torch.empty_like(found), precision="exact")))
    if kind == "ordinary":
        assert kept.square == pytest.approx(float((b @ a).square().sum()), rel=3.4e-4)


def test_a_build_of_another_source_is_not_used(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [("bytes", ctypes.c_char * (ctypes.sizeof(compiled.MergeJob) + 8))]

    monkeypatch.setattr(compiled, "MergeJob", Longer)
    assert compiled._load(BUILDS[0].name) is None
    assert compiled._load("none") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch, warnings
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.update import LowRankUpdate
torch.set_num_threads(2)
W, updates = torch.ones(2048, 512), [LowRankUpdate(torch.ones(1, 512), torch.ones(2048, 1), 1.0)]
merge_weight(W, updates, precision="exact")
warnings.simplefilter("ignore")
child = os.fork()
if not child:
    merged = merge_weight(W, updates, precision="exact")
    torch.set_num_threads(1)  # torch's own threads do not survive a fork
    ok = bool((merged == 2).all())
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("value", "there"), [("0", False), ("1", True)])
def test_the_environment_turns_it_off(value, there):
    code = "from lorafold.kernel.cpu.loader import build; print(build() is not None)"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LORAFOLD_NATIVE": value}, check=True, capture_output=True, text=True
    )
    assert said.stdout.strip() == str(there)

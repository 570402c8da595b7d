"""LoHa and LoKr: the real sum rounded once, by every build and by torch, in memory and from file to file."""

from __future__ import annotations

import math
import os
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.errors import UpdateError
from lorafold.kernel.cpu import loader, multiplying, rowwise
from lorafold.kernel.cpu.multiplying import multiply_between
from lorafold.kernel.cpu.stream import FileRows
from lorafold.kernel.elementsums import merge_elementwise
from lorafold.kernel.elementwise import ElementwiseSum, ElementwiseUpdate, Multiplicand
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.rounding import Stochastic, to_stochastic
from lorafold.kernel.stats import Kept
from lorafold.kernel.update import LowRankUpdate
from oracle import round_fraction

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
WAYS = [*loader.builds(), None]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda build: "torch" if build is None else build.name)
every_build = pytest.mark.parametrize("way", loader.builds(), ids=lambda build: build.name)


@pytest.fixture(scope="module", params=["both"], autouse=True)
def path():
    """In place of the one that runs everything with and without compiled code: these tests say themselves what does the work."""


@contextmanager
def using(build):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiplying, "build", lambda: build)
        yield


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def merged(way, weight, updates, dtype, *, cut=None, noise=None, precision="exact"):
    out, total, kept = torch.empty(weight.shape, dtype=dtype), ElementwiseSum(tuple(updates)), Kept()
    with using(way):
        for start in range(0, weight.shape[0], cut or weight.shape[0]):
            rows = slice(start, start + (cut or weight.shape[0]))
            here = None if noise is None else Stochastic(noise.seed, noise.tensor, noise.start + start * weight.shape[1])
            kept += merge_elementwise(weight[rows], total, start, out=out[rows], precision=precision, noise=here)
    return out, kept


def numbers(g, rows, columns, kind, held):
    """Of ordinary size, short ones whose sums lie on ties, or very small ones; some of them zero."""
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    if kind == "short":
        x = torch.sign(x) * 2.0 ** torch.randint(-2, 2, x.shape, generator=g)
    if kind == "tiny":
        x = x * 2.0**-35
    x[torch.rand(x.shape, generator=g) < 0.1] = 0.0
    return x.to(held)


def sides(g, shape, r, kind, held):
    """A product of rank `r`; of rank 0 a matrix as it is."""
    rows, columns = shape
    if not r:
        return Multiplicand(numbers(g, rows, columns, kind, held))
    return Multiplicand(numbers(g, r, columns, kind, held), numbers(g, rows, r, kind, held))


def update_of(g, shape, ranks, form, kind, held):
    if form == "plain":
        return ElementwiseUpdate.of(
            LowRankUpdate(numbers(g, 2, shape[1], kind, held), numbers(g, shape[0], 2, kind, held), 2.0**-9)
        )
    scaling = 2.0**-9 if kind == "short" else 0.003
    if form == "hadamard":
        ranks = [max(1, r) for r in ranks]
        return ElementwiseUpdate(sides(g, shape, ranks[0], kind, held), sides(g, shape, ranks[1], kind, held), scaling)
    c, d = (max(n for n in range(1, size + 1) if size % n == 0 and n <= most) for size, most in zip(shape, (4, 7), strict=True))
    one = sides(g, (shape[0] // c, shape[1] // d), ranks[0], kind, held)
    return ElementwiseUpdate(one, sides(g, (c, d), ranks[1], kind, held), scaling, kronecker=True)


def dense(update):
    """ΔW in rational numbers."""

    def matrix(side):
        A = [[Fraction(x) for x in row] for row in side.lora_A.double().tolist()]
        if side.lora_B is None:
            return A
        B = [[Fraction(x) for x in row] for row in side.lora_B.double().tolist()]
        return [[sum((b * A[k][j] for k, b in enumerate(row)), Fraction(0)) for j in range(len(A[0]))] for row in B]

    P, s = matrix(update.one), Fraction(update.scaling)
    if update.other is None:
        return [[s * p for p in row] for row in P]
    Q = matrix(update.other)
    if not update.kronecker:
        return [[s * p * q for p, q in zip(*rows, strict=True)] for rows in zip(P, Q, strict=True)]
    return [[s * p * q for p in of_P for q in of_Q] for of_P in P for of_Q in Q]


def real_sum(weight, updates):
    found = [[Fraction(w) for w in row] for row in weight.double().tolist()]
    for update in updates:
        found = [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(found, dense(update), strict=True)]
    return found


def oracle(weight, updates, dtype):
    """The real sum, rounded once; what rounds to zero keeps its sign, and a sum of zero is +0."""
    real = real_sum(weight, updates)
    rounded = [[math.copysign(round_fraction(x, dtype), x) for x in row] for row in real]
    return torch.tensor(rounded, dtype=torch.float64).to(dtype)


FORM = st.tuples(st.sampled_from(["hadamard", "kronecker", "plain"]), st.tuples(st.integers(0, 5), st.integers(0, 3)))


@every_way
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 19), st.sampled_from([1, 6, 16, 17, 35])),
    forms=st.lists(FORM, min_size=1, max_size=3),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    held=st.sampled_from(DTYPES),
    kind=st.sampled_from(["ordinary", "short", "tiny"]),
)
def test_the_real_sum_rounded_once(way, seed, shape, forms, source, target, held, kind):
    g = torch.Generator().manual_seed(seed)
    weight = numbers(g, *shape, kind, torch.float64).mul(0.1 if kind == "ordinary" else 1.0).to(source)
    updates = [update_of(g, shape, ranks, form, kind, held) for form, ranks in forms]
    expected = oracle(weight, updates, target)
    found, kept = merged(way, weight, updates, target)
    assert torch.equal(bits(found), bits(expected))
    delta = torch.tensor([[float(x) for x in row] for row in real_sum(weight * 0, updates)], dtype=torch.float64)
    assert kept.square == pytest.approx(float(delta.square().sum()), rel=1e-12)
    moved = (found.double() - weight.double()) * delta
    assert kept.dot == pytest.approx(float(moved.sum()), abs=1e-12 * float(moved.abs().sum() + delta.square().sum()))


def large(dtype, held=torch.float32):
    """Several panels of columns, the last cut short, and rows that end within a strip."""
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(77, 1050, generator=g) * 0.05).to(dtype)
    return weight, [update_of(g, weight.shape, (9, 4), form, "ordinary", held) for form in ("hadamard", "kronecker", "plain")]


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cut", [None, 8, 13])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_and_cuts_change_nothing(way, dtype, cut, threads, monkeypatch):
    weight, updates = large(dtype)
    expected, _ = merged(None, weight, updates, dtype)
    monkeypatch.setattr(multiplying, "_ALONE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, _ = merged(way, weight, updates, dtype, cut=cut)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(found), bits(expected))


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_stochastic_rounding(way, dtype, precision):
    """Of the real sum rounded to float32, with what the elements draw by their place in the tensor; `fast` may be off in that."""
    weight, updates = large(dtype)
    noise = Stochastic(3, "some", 5)
    single, _ = merged(None, weight, updates, torch.float32)
    expected = to_stochastic(single, dtype, noise)
    for cut in (None, 13):
        found, _ = merged(way, weight, updates, dtype, cut=cut, noise=noise, precision=precision)
        differ = bits(found) != bits(expected)
        assert int(differ.sum()) <= (0 if precision == "exact" else 2)


@every_way
def test_fast_is_nearly_exact(way):
    weight, updates = large(torch.bfloat16)
    expected, _ = merged(way, weight, updates, torch.bfloat16)
    found, _ = merged(way, weight, updates, torch.bfloat16, precision="fast")
    assert int((found != expected).sum()) <= 1, "float64 sums, of which one in 2^40 lies that near to a tie"


@every_way
def test_other_layouts_and_the_order_change_nothing(way):
    """Factors that are transposed views, a weight with rows apart, an update that is the transpose of its transpose."""
    weight, updates = large(torch.bfloat16)
    expected, _ = merged(way, weight, updates, torch.bfloat16)
    room = torch.zeros(77, 1060, dtype=torch.bfloat16)
    room[:, :1050] = weight
    turned = [update.T for update in updates]
    copies = [
        ElementwiseUpdate(
            *(None if s is None else Multiplicand(s.lora_A.contiguous(), s.lora_B.contiguous()) for s in (u.one, u.other)),
            u.scaling,
            u.kronecker,
        )
        for u in turned
    ]
    for others in ([update.T for update in copies], updates[::-1]):
        found, _ = merged(way, room[:, :1050], others, torch.bfloat16)
        assert torch.equal(bits(found), bits(expected))
    across, _ = merged(way, weight.T.contiguous(), turned, torch.bfloat16)
    assert torch.equal(bits(across.T), bits(expected))


def test_a_plain_update_is_merged_as_ever():
    weight, updates = large(torch.bfloat16)
    plain = updates[2]
    found, _ = merged(loader.build(), weight, [plain], torch.bfloat16)
    assert torch.equal(bits(found), bits(merge_weight(weight, [LowRankUpdate(plain.one.lora_A, plain.one.lora_B, plain.scaling)])))


@every_way
@pytest.mark.parametrize("size", [2.0**-160, 2.0**60])
def test_numbers_beyond_what_is_bounded(way, size):
    """Products of float64 factors that underflow, or grow large: each element by itself, and as right."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 6, generator=g).bfloat16()
    update = ElementwiseUpdate(
        *(Multiplicand(torch.randn(2, 6, generator=g).double() * size, torch.randn(5, 2, generator=g) * size) for _ in "PQ"), 1.0
    )
    for dtype in (torch.float32, torch.float64):
        found, _ = merged(way, weight, [update], dtype)
        assert torch.equal(found, oracle(weight, [update], dtype))


@every_way
def test_what_is_not_finite_is_told(way):
    weight, updates = large(torch.bfloat16)
    weight[29, 3], weight[41, 7] = float("nan"), float("-inf")
    found, kept = merged(way, weight, updates, torch.bfloat16)
    assert bits(found[29, 3:4]).view(torch.int16).tolist() == [0x7FC0]
    assert found[41, 7] == float("-inf")
    assert kept.square != kept.square or kept.dot != kept.dot
    weight[29, 3] = weight[41, 7] = 1.0
    other, _ = merged(way, weight, updates, torch.bfloat16)
    other[29, 3], other[41, 7] = found[29, 3], found[41, 7]
    assert torch.equal(bits(found), bits(other))


@every_way
def test_flushing_subnormal_numbers_changes_nothing(way):
    g = torch.Generator().manual_seed(2)
    weight = (torch.randn(20, 40, generator=g) * 2.0**-135).float()
    update = ElementwiseUpdate(
        *(Multiplicand(torch.randn(2, 40, generator=g) * 2.0**-70, torch.randn(20, 2, generator=g)) for _ in "PQ"), 1.0
    )
    expected, _ = merged(way, weight, [update], torch.float32)
    torch.set_flush_denormal(True)
    try:
        found, _ = merged(way, weight, [update], torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(found), bits(expected))
    assert not torch.equal(found, weight)


def test_what_does_not_fit_is_refused():
    one, other = (Multiplicand(torch.ones(1, n), torch.ones(3, 1)) for n in (2, 4))
    with pytest.raises(UpdateError, match=r"\(3, 2\) and \(3, 4\)"):
        ElementwiseUpdate(one, other, 1.0)
    with pytest.raises(UpdateError, match="finite"):
        ElementwiseUpdate(one, one, float("nan"))


# --- from file to file

BEFORE = b"before: 11b"


@every_build
@pytest.mark.skipif(not loader.builds() or loader.builds()[0].row_stream is None, reason="no compiled code for files")
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("first", [0, 13])
def test_the_bytes_of_memory(way, source, target, first, tmp_path, monkeypatch):
    """A strip at a time; then what is there is compared, and one wrong byte stops before its strip."""
    monkeypatch.setattr(rowwise, "_THROUGH", 1)
    weight, updates = large(source)
    total, height = ElementwiseSum(tuple(updates)), way.number("rows")
    expected, _ = merged(None, weight, updates, target)
    rows, columns = weight.shape[0] - first, weight.shape[1]
    (tmp_path / "source").write_bytes(BEFORE + bytes(bits(weight[first:]).numpy()))
    (tmp_path / "target").write_bytes(BEFORE)
    fds = [os.open(tmp_path / name, os.O_RDWR) for name in ("source", "target")]
    try:
        rows_in, rows_out = FileRows(fds[0], 11, source, columns), FileRows(fds[1], 11, target, columns)
        with using(way):
            done, share = multiply_between(rows_in, rows, rows_out, total, first, "exact", None)
            assert done == rows
            assert (tmp_path / "target").read_bytes() == BEFORE + bytes(bits(expected[first:]).numpy())
            found = torch.zeros(rows * rows_out.row_bytes, dtype=torch.uint8)
            compared = FileRows(fds[1], 11, target, columns, found)
            assert multiply_between(rows_in, rows, compared, total, first, "exact", None) == (rows, share)
            assert bytes(found.numpy()) == bytes(bits(expected[first:]).numpy())
            os.pwrite(fds[1], b"\x55", 11 + 29 * rows_out.row_bytes + 7)
            assert multiply_between(rows_in, rows, compared, total, first, "exact", None)[0] == 29 - 29 % height
            os.pwrite(fds[0], b"\xff" * 8, 11 + 29 * rows_in.row_bytes)  # NaN in each dtype
            assert multiply_between(rows_in, rows, rows_out, total, first, "exact", None)[0] == 29 - 29 % height
    finally:
        for fd in fds:
            os.close(fd)

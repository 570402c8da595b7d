"""DoRA and its like: the bits of their definition, of every build and of torch, in memory and from file to file."""

from __future__ import annotations

import os
from contextlib import contextmanager
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import rescale
from lorafold.kernel.cpu import loader, rescaling, rowwise
from lorafold.kernel.cpu.rescaling import add_squares_between, rescale_between
from lorafold.kernel.cpu.stream import FileRows
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.rescale import add_column_squares, rescale_rows
from lorafold.kernel.rounding import Stochastic
from lorafold.kernel.stages import EPS, Rescale, Stage
from lorafold.kernel.stats import Kept
from lorafold.kernel.update import LowRankUpdate
from lorafold.kernel.wide import column_lengths
from oracle import length, round_fraction

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
        patch.setattr(rescaling, "build", lambda: build)
        yield


def randn(g, *shape, scale=1.0):
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


def lengths_of(weight, update):
    squares = torch.zeros(weight.shape[1], dtype=torch.float64)
    with using(None):
        add_column_squares(squares, weight, Stage(update), 0)
    return column_lengths(squares)


def stages_of(weight, kinds, g, *, held=torch.float32, r=3):
    """A stage for each of `kinds`: "plain", or what rescales: ("row" or "column", strength, rule)."""
    rows, columns = weight.shape
    stages = []
    for kind in kinds:
        update = LowRankUpdate(randn(g, r, columns).to(held), randn(g, rows, r, scale=0.1).to(held), 0.3)
        if kind == "plain":
            stages.append(Stage(update))
            continue
        side, strength, rule = kind
        of_rows = side == "row"
        magnitude = randn(g, rows if of_rows else columns).abs() + 0.5
        stages.append(Stage(update, Rescale(magnitude, strength, None if of_rows else lengths_of(weight, update), rule)))
    return stages


def merged(way, weight, stages, dtype, *, cut=None):
    out = torch.empty(weight.shape, dtype=dtype)
    kept, each = Kept(), cut or weight.shape[0]
    with using(way):
        for start in range(0, weight.shape[0], each):
            rows = slice(start, start + each)
            kept += rescale_rows(weight[rows], stages, start, out=out[rows])
    return out, kept


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def defined(weight, stages):
    """The formula in Python's float64, operation by operation; rounded to `dtype` it is the result."""
    base = weight.double().tolist()
    value = [list(row) for row in base]
    for stage in stages:
        update, rescale = stage.update, stage.rescale
        A, B = update.lora_A.double().tolist(), update.lora_B.double().tolist()
        for i, row in enumerate(base):
            delta = []
            for j in range(len(row)):
                total = 0.0
                for k in range(update.r):
                    total += B[i][k] * A[k][j]
                delta.append(total * update.scaling)
            factors = [1.0] * len(row)
            keep = 0.0
            if rescale is not None:
                m = rescale.magnitude.tolist()
                if rescale.lengths is None:
                    found = [m[i] / (length([w + d for w, d in zip(row, delta, strict=True)]) + rescale.eps)] * len(row)
                else:
                    found = [x / (of_column + rescale.eps) for x, of_column in zip(m, rescale.lengths.tolist(), strict=True)]
                s = rescale.strength
                factors = [x * s for x in found] if rescale.rule == "peft" else [(x - 1) * s + 1 for x in found]
                keep = 1 - s if rescale.rule == "peft" else 0.0
            scaled = [(v + d) * f for v, d, f in zip(value[i], delta, factors, strict=True)]
            value[i] = [v * keep + x if keep else x for v, x in zip(value[i], scaled, strict=True)]
    return value


KIND = st.one_of(
    st.just("plain"),
    st.tuples(st.sampled_from(["row", "column"]), st.sampled_from([1.0, 0.5, -0.3, 2.0]), st.sampled_from(["peft", "lycoris"])),
)


@every_way
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 11),
    columns=st.sampled_from([1, 3, 16, 17, 70]),
    kinds=st.lists(KIND, min_size=1, max_size=3),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    held=st.sampled_from(DTYPES),
    tiny=st.booleans(),
)
def test_as_it_is_defined(way, seed, rows, columns, kinds, source, target, held, tiny):
    """Each element is the number of the definition, rounded once; subnormal numbers of its dtype too."""
    g = torch.Generator().manual_seed(seed)
    weight = randn(g, rows, columns, scale=2.0**-20 if tiny else 1.0).to(source)
    stages = stages_of(weight, kinds, g, held=held)
    if tiny:
        small = 2.0 ** (-24 if target == torch.float16 else -130)
        for stage in stages:
            if stage.rescale is not None:
                stage.rescale.magnitude.mul_(small)
    found, _ = merged(way, weight, stages, target)
    expected = [[round_fraction(Fraction(x), target) if x else 0.0 for x in row] for row in defined(weight, stages)]
    assert found.double().tolist() == expected


@every_way
@pytest.mark.parametrize(("dtype", "held"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("cut", [None, 8, 40, 13])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_and_cuts_change_nothing(way, dtype, held, cut, threads, monkeypatch):
    """Of rows that begin where compiled blocks do, and where they do not."""
    weight, stages = large(dtype, held)
    expected, kept = merged(None, weight, stages, dtype)
    monkeypatch.setattr(rescaling, "_ALONE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = merged(way, weight, stages, dtype, cut=cut)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(found), bits(expected))
    # sums of 83 · 330 float64 numbers, in any order, of which the squares are all positive; each is below the sum of squares
    assert again.square == pytest.approx(kept.square, rel=weight.numel() * 2.0**-52)
    assert again.dot == pytest.approx(kept.dot, abs=kept.square * weight.numel() * 2.0**-51)


def large(dtype, held):
    g = torch.Generator().manual_seed(5)
    weight = randn(g, 83, 330, scale=0.05).to(dtype)
    kinds = [("row", 1.0, "peft"), "plain", ("row", 0.7, "lycoris"), ("column", 0.5, "peft"), ("row", -0.5, "peft")]
    return weight, stages_of(weight, kinds, g, held=held, r=9)


@every_way
def test_flushing_subnormal_numbers_changes_nothing(way):
    g = torch.Generator().manual_seed(2)
    weight = randn(g, 20, 40, scale=2.0**-140).float()
    update = LowRankUpdate(randn(g, 2, 40, scale=2.0**-130).float(), randn(g, 20, 2, scale=2.0**-12).float(), 1.0)
    stages = [Stage(update, Rescale(randn(g, 20, scale=2.0**-137).abs())), Stage(update, Rescale(randn(g, 20, scale=2.0**-137)))]
    expected, _ = merged(way, weight, stages, torch.float32)
    assert expected.any()
    torch.set_flush_denormal(True)
    try:
        found, _ = merged(way, weight, stages, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(found), bits(expected))


@every_way
def test_zeros_are_positive(way):
    update = LowRankUpdate(torch.zeros(1, 5), torch.zeros(9, 1), -1.0)
    weight = -torch.zeros(9, 5)
    weight[:, 0] = 1.0
    found, kept = merged(way, weight, [Stage(update, Rescale(-torch.ones(9, dtype=torch.float64)))], torch.bfloat16)
    assert not torch.signbit(found[:, 1:]).any()
    assert found[:, 0].tolist() == [-1.0] * 9
    assert kept == Kept(36.0, 36.0)


@every_way
def test_what_is_not_finite_is_told(way):
    """Whichever way it goes, NaN is written as torch's, and shows in what was kept."""
    weight, stages = large(torch.bfloat16, torch.float32)
    weight[29, 3] = float("nan")
    found, kept = merged(way, weight, stages, torch.bfloat16)
    assert bits(found[29]).view(torch.int16).tolist() == [0x7FC0] * 330
    assert kept.square != kept.square
    weight[29, 3] = 1.0
    other, _ = merged(way, weight, stages, torch.bfloat16)
    assert torch.equal(bits(found[:29]), bits(other[:29]))


@pytest.mark.parametrize("rule", ["peft", "lycoris"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_near_the_real_formula(rule, strength):
    """Within a bound of the real number that is derived thus, to first order, with u = 2⁻⁵³.

    Let x be a row of W + ΔW, and e ≤ (r + 2) u (|W| + Σ|sBA|) the error of its sums. ‖x‖ is off by ‖e‖ and by (n / 128 + 6) u ‖x‖.
    So with f = m / ‖x‖, which is rounded once, or twice where eps is added, strength · f · x is off by

        strength · f · (e + |x| · (‖e‖ / ‖x‖ + (n / 128 + 6 + 4) u)),

    its own two roundings counted; (1 − strength) · W, whose factor is rounded, by 2 u of it, and the last sum by u of the whole.
    LyCORIS's factor 1 + strength · (f − 1) adds roundings of f − 1, its product and the sum, each of at most u (f + 1), and there
    is one of the product with x, of u (f + 1) |x| too where strength is at most 1.
    """
    g = torch.Generator().manual_seed(3)
    weight = randn(g, 4, 150).bfloat16()
    (stage,) = stages_of(weight, [("row", strength, rule)], g, r=5)
    found, _ = merged(loader.build(), weight, [stage], torch.float64)
    update, u = stage.update, Fraction(2) ** -53
    A, B, scaling = (
        [[Fraction(x) for x in row] for row in factor.double().tolist()]
        for factor in (update.lora_A, update.lora_B, torch.tensor([[update.scaling]], dtype=torch.float64))
    )
    s, rank, n = scaling[0][0], 5, 150
    strong = Fraction(strength)
    for i, row in enumerate(weight.double().tolist()):
        terms = [[s * B[i][k] * A[k][j] for k in range(rank)] for j in range(n)]
        x = [Fraction(w) + sum(each) for w, each in zip(row, terms, strict=True)]
        e = [(rank + 2) * u * (abs(Fraction(w)) + sum(map(abs, each))) for w, each in zip(row, terms, strict=True)]
        norm, error = root(sum(a * a for a in x)), root(sum(a * a for a in e))
        f = Fraction(float(stage.rescale.magnitude[i])) / (norm + (Fraction(EPS) if rule == "lycoris" else 0))
        relative = error / norm + (Fraction(n, 128) + 10) * u
        for j, w in enumerate(row):
            if rule == "peft":
                real = strong * f * x[j] + (1 - strong) * Fraction(w)
                bound = strong * f * (e[j] + abs(x[j]) * relative) + (1 - strong) * abs(Fraction(w)) * 3 * u + abs(real) * u
            else:
                factor = 1 + strong * (f - 1)
                real = factor * x[j]
                bound = factor * e[j] + abs(x[j]) * (strong * f * relative + 4 * u * (f + 1))
            assert abs(Fraction(float(found[i, j])) - real) <= bound * (1 + Fraction(2) ** -30)  # what is of second order


def root(x):
    with localcontext() as context:
        context.prec = 60
        return Fraction((Decimal(x.numerator) / Decimal(x.denominator)).sqrt())


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding(way, dtype, monkeypatch):
    """What `merge_weight` makes of the number before it is rounded, as if nothing were added to it; in tiles, the same."""
    weight, stages = large(torch.float32, torch.float32)
    noise, found = Stochastic(3, "some", 5), torch.empty(weight.shape, dtype=dtype)
    value, _ = merged(way, weight, stages, torch.float64)
    nothing = LowRankUpdate(torch.zeros(1, 330), torch.zeros(83, 1), 1.0)
    expected = merge_weight(value, [nothing], out=torch.empty_like(found), rounding=noise)
    for tile in (1 << 16, 1):
        monkeypatch.setattr(rescale, "_TILE", tile)
        with using(way):
            kept = rescale_rows(weight, stages, 0, out=found, rounding=noise)
        assert torch.equal(bits(found), bits(expected))
        moved = value - weight.double()
        assert kept.square == pytest.approx(float(moved.square().sum()), rel=weight.numel() * 2.0**-52)


# --- from file to file

BEFORE = b"before: 11b"


def raw(tensor):
    return bytes(bits(tensor).numpy())


@every_build
@pytest.mark.skipif(not loader.builds() or loader.builds()[0].row_stream is None, reason="no compiled code for files")
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("first", [0, 16])
def test_the_bytes_of_memory(way, source, target, first, tmp_path, monkeypatch):
    """A strip at a time; then what is there is compared, and one wrong byte stops before its strip."""
    monkeypatch.setattr(rowwise, "_THROUGH", 1)
    weight, stages = large(source, torch.float32)
    expected, kept = merged(None, weight, stages, target)
    rows, columns = weight.shape[0] - first, weight.shape[1]
    (tmp_path / "source").write_bytes(BEFORE + raw(weight[first:]))
    (tmp_path / "target").write_bytes(BEFORE)
    fds = [os.open(tmp_path / name, os.O_RDWR) for name in ("source", "target")]
    try:
        rows_in, rows_out = FileRows(fds[0], 11, source, columns), FileRows(fds[1], 11, target, columns)
        with using(way):
            done, share = rescale_between(rows_in, rows, rows_out, stages, first)
            assert done == rows
            assert (tmp_path / "target").read_bytes() == BEFORE + raw(expected[first:])
            if not first:
                assert share.square == pytest.approx(kept.square, rel=weight.numel() * 2.0**-52)
            found = torch.zeros(rows * rows_out.row_bytes, dtype=torch.uint8)
            compared = FileRows(fds[1], 11, target, columns, found)
            assert rescale_between(rows_in, rows, compared, stages, first) == (rows, share)
            assert bytes(found.numpy()) == raw(expected[first:])
            os.pwrite(fds[1], b"\x55", 11 + 29 * rows_out.row_bytes + 7)
            height = way.number("rows")
            assert rescale_between(rows_in, rows, compared, stages, first)[0] == 29 - 29 % height
            os.pwrite(fds[0], b"\xff" * 8, 11 + 29 * rows_in.row_bytes)  # NaN in each dtype
            assert rescale_between(rows_in, rows, rows_out, stages, first)[0] == 29 - 29 % height
    finally:
        for fd in fds:
            os.close(fd)


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [torch.float32, torch.float64])
def test_squares_of_columns(way, dtype, held, tmp_path, monkeypatch):
    """In blocks, in memory and from a file: those of torch."""
    monkeypatch.setattr(rowwise, "_THROUGH", 1)
    weight, stages = large(dtype, held)
    expected = torch.zeros(330, dtype=torch.float64)
    with using(None):
        add_column_squares(expected, weight, stages[0], 0)
    found = torch.zeros(330, dtype=torch.float64)
    with using(way):
        for start in range(0, 83, 24):
            add_column_squares(found, weight[start : start + 24], stages[0], start)
        assert torch.equal(found, expected)
        (tmp_path / "source").write_bytes(BEFORE + raw(weight))
        fd = os.open(tmp_path / "source", os.O_RDONLY)
        try:
            found.zero_()
            done = add_squares_between(found, FileRows(fd, 11, dtype, 330), 83, stages[0], 0)
        finally:
            os.close(fd)
    assert done == (0 if way is None else 83)
    assert torch.equal(found, expected if done else torch.zeros(330, dtype=torch.float64))

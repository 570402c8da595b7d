"""Stochastic rounding in compiled code: the bits that torch gives, which rounds in operations of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import rounding
from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu import loader, stream
from lorafold.kernel.cpu.loader import Build
from lorafold.kernel.cpu.stream import FileRows, merge_between
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_measured, merge_rows, merge_weight
from lorafold.kernel.rounding import Stochastic, to_stochastic
from lorafold.kernel.update import LowRankUpdate

BUILDS = loader.builds()
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]
pytestmark = pytest.mark.skipif(not BUILDS, reason="no compiled kernel here")
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)


@pytest.fixture(scope="module", params=["both"], autouse=True)
def path() -> None:
    """These tests compare the two themselves."""


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(build: Build | None) -> None:
        for module in (native, rounding, stream):
            monkeypatch.setattr(module, "build", lambda: build)

    return use


def weight_of(g: torch.Generator, shape: tuple[int, int], dtype: torch.dtype, kind: str) -> torch.Tensor:
    """Ordinary numbers, or with the ends of the range, subnormal numbers, zeros of both signs, infinities and NaN among them."""
    info = torch.finfo(dtype)
    x = torch.randn(shape, generator=g, dtype=torch.float64) * (2.0**-13 if kind == "small" else 0.02)
    pick = torch.randint(0, 12, shape, generator=g)
    values = {
        "ends": [info.max, -info.max, info.tiny, -info.tiny, info.tiny * info.eps, info.tiny * 0.75, 65504.0, -65504.0, 65519.0],
        "special": [0.0, -0.0, float("inf"), float("-inf"), float("nan")],
    }.get(kind, [])
    for i, value in enumerate(values):
        x[pick == i] = value
    return x.to(dtype)


@pytest.mark.usefixtures("using")
@every_build
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    r=st.sampled_from([1, 7, 16, 33, 130, 260]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(HALVES),
    kind=st.sampled_from(["ordinary", "small", "ends", "special"]),
    size=st.sampled_from([2.0**-60, 1e-6, 1e-3, 3.0]),
    start=st.sampled_from([0, 1, 2**32 - 20, 2**32 + 1, 2**62 + 3]),
    apart=st.booleans(),
)
def test_same_bits_as_torch(
    build: Build,
    seed: int,
    rows: int,
    columns: int,
    r: int,
    source: torch.dtype,
    target: torch.dtype,
    kind: str,
    size: float,
    start: int,
    apart: bool,
) -> None:
    """Of `exact`, whose sums do not depend on who adds; rows next to each other, or apart, of a tensor that begins before."""
    g = torch.Generator().manual_seed(seed)
    weight = weight_of(g, (rows, columns + 3), source, kind)
    weight = weight[:, :columns] if apart else weight[:, :columns].contiguous()
    update = LowRankUpdate(torch.randn(r, columns, generator=g) * 0.05, torch.randn(rows, r, generator=g) * size, 0.7)
    noise = Stochastic(seed, "model.w", start)
    found = []
    for used in (None, build):
        with pytest.MonkeyPatch.context() as patch:
            for module in (native, rounding):
                patch.setattr(module, "build", lambda used=used: used)
            out = torch.empty(rows, columns, dtype=target)
            kept = merge_measured(weight, [update], out=out, rounding=noise)[1]
            found.append((out.view(torch.int16), kept))
    assert torch.equal(found[0][0], found[1][0])
    if kind == "ordinary" and size > 1e-9:  # float32 sums of at most 2800 products each, on either path: see test_merge
        moved = float((out.double() - weight.double()).norm())
        assert found[1][1].dot == pytest.approx(found[0][1].dot, abs=3.4e-4 * moved * found[0][1].square ** 0.5 + 1e-300)


@every_build
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", HALVES)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_which_dtypes_it_does(build: Build, source: torch.dtype, target: torch.dtype, precision: Any, using: Any) -> None:
    """All; the test above would not notice if nothing were compiled."""
    using(build)
    factors = stack([LowRankUpdate(torch.randn(2, 9), torch.randn(5, 2), 1.0)])
    out = torch.empty(5, 9, dtype=target)
    assert native.merge_native(torch.randn(5, 9).to(source), out, factors, precision=precision, noise=Stochastic()) is not None


@every_build
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", HALVES)
def test_fast_is_its_sum_rounded(build: Build, source: torch.dtype, target: torch.dtype, using: Any) -> None:
    """The sum in float32 that this build writes into float32, rounded by torch."""
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(37, 53, generator=g) * 0.02).to(source)
    update = LowRankUpdate(torch.randn(19, 53, generator=g), torch.randn(37, 19, generator=g) * 0.01, 0.3)
    noise = Stochastic(3, "w", 2**40)
    using(build)
    found = merge_weight(weight, [update], out=torch.empty(37, 53, dtype=target), precision="fast", rounding=noise)
    single = merge_weight(weight, [update], out=torch.empty(37, 53), precision="fast")
    using(None)
    assert torch.equal(found, to_stochastic(single, target, noise))


@every_build
@pytest.mark.parametrize("target", HALVES)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_chunks_and_threads_change_nothing(
    build: Build, target: torch.dtype, threads: int, using: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(2)
    weight = (torch.randn(101, 67, generator=g) * 0.02).to(target)
    update = LowRankUpdate(torch.randn(5, 67, generator=g), torch.randn(101, 5, generator=g) * 0.01, 1.3)
    noise = Stochastic(1, "w")
    using(None)
    expected = merge_weight(weight, [update], rounding=noise)
    using(build)
    monkeypatch.setattr(native, "_CHUNK", 700)
    monkeypatch.setattr(native, "_ALONE", 300)
    monkeypatch.setattr(native, "_ROOM", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(merge_weight(weight, [update], rounding=noise), expected)
    finally:
        torch.set_num_threads(before)
    part = torch.empty(48, 67, dtype=target)  # some rows of the whole, at an offset that is no whole block
    noise = Stochastic(1, "w", 13 * 67)
    merge_rows(weight[13:61], stack([update]), 13, out=part, precision="exact", rounding=noise)
    assert torch.equal(part, expected[13:61])


@every_build
@pytest.mark.parametrize("target", HALVES)
def test_what_underflows_is_settled_outside(build: Build, target: torch.dtype, using: Any) -> None:
    """Products far below float64's range, which compiled code leaves over, beside sums that lie where a number is drawn."""
    g = torch.Generator().manual_seed(8)
    single = weight_of(g, (16, 33), torch.float32, "ordinary")
    a, b = torch.full((2, 33), 2.0**-70, dtype=torch.float64), torch.full((16, 2), 2.0**-900, dtype=torch.float64)
    a[:, ::2] *= 2.0**-900
    update = LowRankUpdate(a, b, 1.0)
    noise = Stochastic(4, "w", 77)
    drawn = rounding._uniform(single.numel(), noise, single.device).view_as(single)
    step = torch.finfo(target).eps  # sums on the numbers that decide: 1 + the number drawn, in steps
    weight = (1 + ((drawn.double() * 2**16).floor() * 2.0**-16) * step).float()
    found = []
    for used in (None, build):
        using(used)
        found.append(merge_weight(weight, [update], out=torch.empty(16, 33, dtype=target), rounding=noise))
    assert torch.equal(found[0], found[1])


@every_build
def test_subnormal_numbers_count(build: Build, using: Any) -> None:
    """Whatever the caller has set: flushed to zero, small numbers of float16 would lose what is added to them."""
    g = torch.Generator().manual_seed(9)
    weight = (torch.randn(16, 40, generator=g) * 2.0**-130).bfloat16()
    update = LowRankUpdate(torch.randn(2, 40, generator=g) * 2.0**-66, torch.randn(16, 2, generator=g) * 2.0**-66, 1.0)
    using(None)
    expected = merge_weight(weight, [update], rounding=Stochastic(2))
    using(build)
    torch.set_flush_denormal(True)
    try:
        found = merge_weight(weight, [update], rounding=Stochastic(2))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))
    assert not torch.equal(found.view(torch.int16), weight.view(torch.int16))


@every_build
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_from_file_to_files(build: Build, precision: Any, tmp_path: Path, using: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To several at once, each with a name, a seed and a place of its own, one of them rounded to nearest."""
    if build.stream() is None:
        pytest.skip("no pread here")
    using(build)
    monkeypatch.setattr(stream, "_THROUGH", 1)
    monkeypatch.setattr(stream, "_MOST", 1)
    g = torch.Generator().manual_seed(6)
    weight = (torch.randn(45, 21, generator=g) * 0.02).bfloat16()
    factors = [
        stack([LowRankUpdate(torch.randn(r, 21, generator=g), torch.randn(45, r, generator=g) * 0.01, 0.7)]) for r in (4, 33, 4, 4)
    ]
    dtypes = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
    roundings = [Stochastic(1, "a", 2**33), Stochastic(2, "b", 21 * 8), "nearest", Stochastic(1, "a")]
    (tmp_path / "base").write_bytes(weight.view(torch.uint8).numpy().tobytes())
    source = os.open(tmp_path / "base", os.O_RDONLY)
    ends = [os.open(tmp_path / f"{i}", os.O_RDWR | os.O_CREAT) for i in range(4)]
    try:
        to = [FileRows(end, 0, dtype, 21) for end, dtype in zip(ends, dtypes, strict=True)]
        base, updates = FileRows(source, 0, torch.bfloat16, 21), [(each, 0) for each in factors]
        done, _ = merge_between(base, 45, to, updates, precision=precision, roundings=roundings)
    finally:
        for end in (source, *ends):
            os.close(end)
    assert done == 45
    for i, (each, dtype, how) in enumerate(zip(factors, dtypes, roundings, strict=True)):
        out = torch.empty(45, 21, dtype=dtype)
        merge_rows(weight, each, 0, out=out, precision=precision, rounding=how)
        assert (tmp_path / f"{i}").read_bytes() == out.view(torch.uint8).numpy().tobytes()

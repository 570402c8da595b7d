"""Merging from file to file in compiled code: the bytes of a merge in memory, and what stops it is left as it was."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu import loader as compiled
from lorafold.kernel.cpu import stream
from lorafold.kernel.cpu.stream import FileRows, merge_between
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_rows
from lorafold.kernel.stats import Kept
from lorafold.kernel.update import LowRankUpdate

BUILDS = [build for build in compiled.builds() if build.stream() is not None]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
pytestmark = pytest.mark.skipif(
    not BUILDS,
    reason="no compiled code for files: no C compiler at installation, LORAFOLD_NATIVE=0, or no pread",
)
every_build = pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
BEFORE, AFTER = b"before: 11b", b"after"


@pytest.fixture(scope="module", params=["both"], autouse=True)
def path():
    """In place of the one that runs everything with and without compiled code: these tests are of that code alone."""


class Files:
    """A weight and room for what it is merged to, each in the middle of a file; as few rows at a time go through as can."""

    def __init__(self, folder, weight, target, *, held=None):
        rows, columns = weight.shape
        self.weight, self.target = weight, target
        (folder / "source").write_bytes(BEFORE + raw(weight) + AFTER)
        self.size = rows * columns * target.itemsize
        (folder / "target").write_bytes(BEFORE + (bytes(self.size) if held is None else held) + AFTER)
        self.folder = folder

    def merge(self, factors, first=0, *, build, precision="exact", found=None, flags=os.O_RDWR, rows=None):
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(stream, "build", lambda: build)
            patch.setattr(stream, "_THROUGH", 1)
            patch.setattr(stream, "_MOST", 1)
            source, target = (os.open(self.folder / name, how) for name, how in (("source", os.O_RDONLY), ("target", flags)))
            stack.callback(os.close, source)
            stack.callback(os.close, target)
            columns = self.weight.shape[1]
            to = FileRows(target, len(BEFORE), self.target, columns, found)
            rows = self.weight.shape[0] if rows is None else rows
            rows_of_source = FileRows(source, len(BEFORE), self.weight.dtype, columns)
            done, (kept,) = merge_between(rows_of_source, rows, [to], [(factors, first)], precision=precision)
            return done, kept

    def written(self):
        content = (self.folder / "target").read_bytes()
        assert content.startswith(BEFORE)
        assert content.endswith(AFTER)
        assert len(content) == len(BEFORE) + self.size + len(AFTER)
        return content[len(BEFORE) : -len(AFTER)]


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def in_memory(weight, factors, first, target, precision, *, build):
    out = torch.empty(weight.shape, dtype=target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "build", lambda: build)  # the last bits of `fast` are those of the build
        kept = merge_rows(weight, factors, first, out=out, precision=precision)
    return raw(out), kept


def whole(rows, build):
    """As many of `rows` as are whole blocks."""
    return rows - rows % build.number("rows")


def factors_of(rows, columns, r, *, seed=0, dtype=torch.float32, size=1.0):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, columns, generator=g) * 0.05, torch.randn(rows, r, generator=g) * size
    return stack([LowRankUpdate(a.to(dtype), b.to(dtype), 0.7)])


@every_build
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    before=st.integers(0, 3),
    behind=st.integers(0, 9),
    columns=st.integers(1, 70),
    r=st.sampled_from([1, 7, 16, 33, 260]),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    held=st.sampled_from([torch.float64, *DTYPES]),
    precision=st.sampled_from(["exact", "fast"]),
)
def test_the_bytes_of_a_merge_in_memory(
    tmp_path_factory, build, seed, rows, before, behind, columns, r, source, target, held, precision
):
    """Of a matrix that has more rows, before and behind: of whole blocks, or up to the end."""
    behind = behind if rows % 8 == 0 else 0
    factors = factors_of(8 * before + rows + behind, columns, r, seed=seed, dtype=held)
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) * 0.02).to(source)
    files = Files(tmp_path_factory.mktemp("files"), weight, target)
    expected, kept_there = in_memory(weight, factors, 8 * before, target, precision, build=build)
    done, kept = files.merge(factors, 8 * before, build=build, precision=precision)
    assert done == rows
    assert files.written() == expected
    # the square is summed in another order: of n numbers in the float32 that `fast` and `exact` may use, n · 2^-24 of it
    assert kept.square == pytest.approx(kept_there.square, rel=rows * columns * 2.0**-24 + 1e-4)
    # and again, to compare: nothing needs to be written, and all that is there is read
    room = torch.zeros(files.size, dtype=torch.uint8)
    again = files.merge(factors, 8 * before, build=build, precision=precision, found=room, flags=os.O_RDONLY)
    assert again == (rows, kept)
    assert raw(room) == files.written()


@every_build
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("damaged", [None, 0, 1, 2])
def test_several_destinations(tmp_path, build, precision, damaged, monkeypatch):
    """The same rows for all, with updates, ranks and dtypes of their own; the third is compared. One that stops stops all."""
    monkeypatch.setattr(stream, "build", lambda: build)
    monkeypatch.setattr(stream, "_THROUGH", 1)
    monkeypatch.setattr(stream, "_MOST", 1)
    weight, dtypes, firsts = torch.randn(48, 21).bfloat16(), (torch.bfloat16, torch.float32, torch.float16), (0, 8, 16)
    factors = [factors_of(64, 21, r, seed=r) for r in (4, 300, 33)]
    if damaged is not None:  # of one of them, in row 29, a product that overflows
        factors[damaged].given_B[firsts[damaged] + 29] = float("inf") if damaged < 2 else 0.0
    expected = [
        in_memory(weight, f, first, dtype, precision, build=build) for f, first, dtype in zip(factors, firsts, dtypes, strict=True)
    ]
    (tmp_path / "source").write_bytes(raw(weight))
    clean = in_memory(weight, factors_of(64, 21, 33, seed=33), 16, torch.float16, precision, build=build)[0]
    for i in range(3):
        (tmp_path / str(i)).write_bytes(clean if i == 2 else b"")
    with ExitStack() as stack:
        source, *targets = (os.open(tmp_path / name, os.O_RDWR) for name in ("source", "0", "1", "2"))
        for fd in (source, *targets):
            stack.callback(os.close, fd)
        room = torch.zeros(len(clean), dtype=torch.uint8)
        to = [
            FileRows(fd, 0, dtype, 21, room if i == 2 else None) for i, (fd, dtype) in enumerate(zip(targets, dtypes, strict=True))
        ]
        updates = list(zip(factors, firsts, strict=True))
        done, kept = merge_between(FileRows(source, 0, torch.bfloat16, 21), 48, to, updates, precision=precision)
    if damaged in (0, 1) and precision == "exact":
        assert done == 0  # its bounds are not finite
        return
    assert done == (48 if damaged is None else whole(29, build))
    for i, dtype in enumerate(dtypes[:2]):
        nbytes = done * 21 * dtype.itemsize
        assert (tmp_path / str(i)).read_bytes()[:nbytes] == expected[i][0][:nbytes]
        if damaged is None:
            assert kept[i].square == pytest.approx(expected[i][1].square, rel=1e-3)
    assert raw(room)[: done * 21 * 2] == clean[: done * 21 * 2]


@every_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 7, 8, 26])
def test_a_difference_stops_the_comparison(tmp_path, build, dtype, row):
    weight, factors = torch.randn(27, 5).to(dtype), factors_of(27, 5, 2)
    expected, _ = in_memory(weight, factors, 0, dtype, "exact", build=build)
    held = bytearray(expected)
    held[row * 5 * dtype.itemsize] ^= 1
    files = Files(tmp_path, weight, dtype, held=bytes(held))
    done, kept = files.merge(factors, build=build, found=torch.zeros(len(held), dtype=torch.uint8), flags=os.O_RDONLY)
    assert done == whole(row, build)
    assert (kept == Kept()) == (done == 0)
    assert files.written() == held


@every_build
@pytest.mark.parametrize("comparing", [False, True])
@pytest.mark.parametrize("left", [0, 3, 8 * 5 * 4, 8 * 5 * 4 + 1, 27 * 5 * 4 - 1])
def test_a_source_that_ends_stops_it(tmp_path, build, left, comparing):
    weight, factors = torch.randn(27, 5), factors_of(27, 5, 2)
    expected, _ = in_memory(weight, factors, 0, torch.float32, "exact", build=build)
    files = Files(tmp_path, weight, torch.float32, held=expected if comparing else None)
    os.truncate(tmp_path / "source", len(BEFORE) + left)
    room = torch.zeros(len(expected), dtype=torch.uint8) if comparing else None
    done, _ = files.merge(factors, build=build, found=room)
    assert done == whole(left // (5 * 4), build)
    if not comparing:
        assert files.written() == expected[: done * 5 * 4] + bytes((27 - done) * 5 * 4)


@every_build
def test_a_target_that_ends_stops_the_comparison(tmp_path, build):
    weight, factors = torch.randn(27, 5), factors_of(27, 5, 2)
    expected, _ = in_memory(weight, factors, 0, torch.float32, "exact", build=build)
    files = Files(tmp_path, weight, torch.float32, held=expected)
    os.truncate(tmp_path / "target", len(BEFORE) + 17 * 5 * 4)
    done, _ = files.merge(factors, build=build, found=torch.zeros(len(expected), dtype=torch.uint8))
    assert done == whole(17, build)


@every_build
def test_what_cannot_be_written_stops_it(tmp_path, build):
    weight, factors = torch.randn(27, 5), factors_of(27, 5, 2)
    files = Files(tmp_path, weight, torch.float32)
    assert files.merge(factors, build=build, flags=os.O_RDONLY) == (0, Kept())
    assert files.written() == bytes(27 * 5 * 4)


@every_build
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4])
@pytest.mark.parametrize("row", [0, 11, 26])
def test_what_is_not_finite_is_not_written(tmp_path, build, value, row, precision):
    """Neither what was so, nor what overflows: 60000 and 40000 are no float16."""
    weight = torch.zeros(27, 5).half()
    weight[row, 4] = value
    factors = stack([LowRankUpdate(torch.ones(1, 5), torch.full((27, 1), 4e4), 1.0)])
    files = Files(tmp_path, weight, torch.float16)
    done, _ = files.merge(factors, build=build, precision=precision)
    assert done == whole(row, build)
    assert files.written() == raw(torch.full((done, 5), 4e4).half()) + bytes((27 - done) * 5 * 2)


@every_build
def test_what_it_does_not_begin(tmp_path, build, monkeypatch):
    weight, factors = torch.randn(16, 5), factors_of(24, 5, 2)
    files = Files(tmp_path, weight, torch.float32)
    assert files.merge(factors, 8, build=build)[0] == 16
    assert files.merge(factors, 0, build=build, rows=0)[0] == 0
    assert files.merge(factors, 3, build=build)[0] == 0  # not where blocks of rows begin
    assert files.merge(factors, 0, build=build, rows=13)[0] == 0  # or end
    assert files.merge(factors, 0, build=None)[0] == 0
    large = torch.full((1, 5), 1e200, dtype=torch.float64), torch.full((24, 1), 1e200, dtype=torch.float64)
    assert files.merge(stack([LowRankUpdate(*large, 1.0)]), 0, build=build)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_WIDEST", 5 * 4 * build.number("rows") - 1)
        assert files.merge(factors, 8, build=build)[0] == 0
    monkeypatch.setattr(type(build), "stream", lambda self: None)  # as where the system has no such calls
    assert files.merge(factors, 8, build=build)[0] == 0


@every_build
def test_what_compiled_code_leaves_undecided_stops_it(tmp_path, build):
    """A product of 2^-1000, beside which a tie is none: it could have lost bits, and is for fractions."""
    a, b = torch.full((1, 5), 2.0**-500, dtype=torch.float64), torch.full((27, 1), 2.0**-500, dtype=torch.float64)
    weight = torch.ones(27, 5, dtype=torch.float32)
    weight[20, 3] += 2.0**-8  # a tie of bfloat16
    files = Files(tmp_path, weight, torch.bfloat16)
    factors = stack([LowRankUpdate(a, b, 1.0)])
    expected, _ = in_memory(weight, factors, 0, torch.bfloat16, "exact", build=build)
    done, _ = files.merge(factors, build=build)
    assert done == whole(20, build)
    assert files.written()[: done * 5 * 2] == expected[: done * 5 * 2]
    assert expected[(20 * 5 + 3) * 2 :][:2] == raw(torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16))

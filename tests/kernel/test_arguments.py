"""Whatever the kernel is given by mistake ends in a typed error, and memory that overlaps is told exactly."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.errors import LorafoldError, UpdateError
from lorafold.kernel.arguments import _is_apart, _overlap
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.rounding import Stochastic
from lorafold.kernel.update import LowRankUpdate, scaling_factor

EXAMPLES = int(os.environ.get("LORAFOLD_FUZZ", "300"))


@pytest.fixture(scope="module", params=["both"], autouse=True)
def path():
    """Whatever does the work, arguments are looked at before."""


def tensors():
    """Of every dtype, layout and kind that torch makes on the CPU, fitting or not."""
    dtypes = [d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith(("torch.q", "torch.bits"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that some are experimental
        found = [torch.empty(3, 4, dtype=dtype) for dtype in dtypes]
        found += [torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4).to_sparse_csr()]
        found += [torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.qint8)]
    for tensor in found:
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16) and tensor.layout == torch.strided:
            tensor.zero_()
    found += [torch.zeros(shape) for shape in ((), (4,), (0, 4), (3, 0), (4, 3), (3, 4, 1), (1, 4), (3, 1), (3, 3))]
    found += [torch.zeros(3, 4, device="meta"), torch.zeros(3, 4, requires_grad=True), torch.nn.Parameter(torch.zeros(3, 4))]
    found += [torch.zeros(4, 3).T, torch.zeros(1, 4).expand(3, 4), torch._neg_view(torch.zeros(3, 4)), torch.zeros(3, 4)[:, ::2]]
    return [*found, torch.full((3, 4), math.nan), torch.zeros(9).as_strided((3, 4), (1, 1))]


NONSENSE = [
    None, True, 0, -1, 1, 2, 2.5, math.nan, math.inf, 10**400, "exact", "fast", "nearest", "stochastic", "", b"x", [], {}, (1, 2),
    object(), Stochastic(), LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0), [None], torch.float32, torch.tensor(1.0), 1j,
    [LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0)],
]  # fmt: skip
ANY = st.one_of(st.sampled_from(NONSENSE), st.sampled_from(tensors()))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data())
def test_merge_weight(data):
    """One argument, or all of them, are nonsense."""
    right = {
        "weight": torch.zeros(3, 4), "updates": [LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0)], "out": torch.zeros(3, 4),
        "precision": "exact", "rounding": "nearest",
    }  # fmt: skip
    for name in data.draw(st.sets(st.sampled_from(sorted(right)), min_size=1)):
        right[name] = data.draw(ANY, label=name)
    with suppress(LorafoldError):
        merged = merge_weight(right["weight"], right["updates"], **{name: right[name] for name in ("out", "precision", "rounding")})
        assert merged.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@settings(max_examples=EXAMPLES, deadline=None)
@given(ANY, ANY, ANY)
def test_an_update(lora_A, lora_B, scaling):
    for given_ in itertools.product((lora_A, torch.ones(2, 4)), (lora_B, torch.ones(3, 2)), (scaling, 0.5)):
        with suppress(LorafoldError):
            update = LowRankUpdate(*given_)
            merge_weight(torch.zeros(update.shape), [update])


@settings(max_examples=EXAMPLES, deadline=None)
@given(ANY, ANY, ANY)
def test_numbers(one, other, third):
    for function in (
        lambda: scaling_factor(one, other),
        lambda: scaling_factor(8, other, third),
        lambda: Stochastic(one, other, third),
    ):
        with suppress(LorafoldError):
            function()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda update: update.cat(None),
        lambda update: update.scaled("2"),
        lambda update: update.scaled(math.nan),
        lambda update: update.scaled(1e308).scaled(1e308),
        lambda update: update.narrow(2, 0, 1),
        lambda update: update.narrow(0, 2, 5),
        lambda update: update.narrow(1, -1, 2),
        lambda update: update.narrow(0, 0, 1.5),
        lambda update: update.dense(torch.int8),
        lambda update: update.dense("float32"),
    ],
)
def test_an_updates_methods_refuse(wrong):
    with pytest.raises(UpdateError):
        wrong(LowRankUpdate(torch.ones(2, 4), torch.ones(3, 2), 1.0))


LATTICES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9), st.integers(0, 12))


def places(lattice):
    rows, columns, down, across, start = lattice
    return [start + i * down + j * across for i in range(rows) for j in range(columns)]


def view(lattice):
    rows, columns, down, across, start = lattice
    return torch.zeros(100).as_strided((rows, columns), (down, across), start)


@settings(max_examples=EXAMPLES, deadline=None)
@given(LATTICES)
def test_elements_apart(lattice):
    found = places(lattice)
    if _is_apart(view(lattice)):
        assert len(set(found)) == len(found)
    elif lattice[2] % 10 > lattice[3] * (lattice[1] - 1) and lattice[3]:
        raise AssertionError("ordinary rows, one behind the other")


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(LATTICES, st.integers(0, 12), st.booleans(), LATTICES)
def test_overlap_is_found(lattice, start, alike, other):
    """Always where elements are shared; never where strides are the same and none is."""
    out = view(lattice)
    if not _is_apart(out):
        return
    second = (*lattice[:4], start) if alike else other
    read = torch.zeros(0).set_(out.untyped_storage(), second[4], second[:2], second[2:4])
    shared = bool(set(places(lattice)) & set(places(second)))
    assert _overlap(out, read) >= shared
    if alike:
        assert _overlap(out, read) == shared


def test_memory_that_is_read_and_written():
    whole = torch.zeros(6, 8)
    update = LowRankUpdate(torch.ones(1, 4), torch.ones(6, 1), 1.0)
    left, right = whole[:, :4], whole[:, 4:]
    merge_weight(left, [update], out=right)  # apart, though their rows alternate
    assert (right == 1).all()
    merge_weight(left, [update], out=left)
    for out, weight in ((whole[:, 1:5], left), (whole[:5, :4], whole[1:, :4]), (whole.view(-1)[:24].view(6, 4), left)):
        with pytest.raises(UpdateError, match="overlaps the weight"):
            merge_weight(weight, [LowRankUpdate(torch.ones(1, 4), torch.ones(weight.shape[0], 1), 1.0)], out=out)
    square = torch.zeros(4, 4)
    with pytest.raises(UpdateError, match="overlaps the weight"):
        merge_weight(square, [], out=square.T)
    with pytest.raises(UpdateError, match="among its own elements"):
        merge_weight(torch.zeros(6, 4), [update], out=torch.zeros(1, 4).expand(6, 4))
    both = torch.zeros(7, 4)
    with pytest.raises(UpdateError, match="overlaps a factor"):
        merge_weight(torch.zeros(6, 4), [LowRankUpdate(both[5:6], torch.ones(6, 1), 1.0)], out=both[:6])
    expanded = torch.ones(1, 4).expand(6, 4)
    assert (merge_weight(expanded, [update]) == 2).all()  # read, it may be expanded


def test_a_storage_that_was_freed():
    weight, update = torch.zeros(3, 4), LowRankUpdate(torch.ones(1, 4), torch.ones(3, 1), 1.0)
    weight.untyped_storage().resize_(0)
    with pytest.raises(UpdateError, match="storage"):
        merge_weight(weight, [update], out=torch.zeros(3, 4))


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_updates_that_only_their_bits_tell_apart(precision):
    """The same sums, of columns in another order: `fast` adds them in one order all the same."""
    g = torch.Generator().manual_seed(0)
    weight, a, b = torch.randn(40, 50, generator=g), torch.randn(3, 50, generator=g), torch.randn(40, 3, generator=g)
    a, b = (a * 8).round() / 8, (b * 8).round() / 8  # so that their sums are the same in any order
    updates = [LowRankUpdate(a[:, torch.randperm(50, generator=g)], b, 0.3) for _ in range(4)]
    first = merge_weight(weight, updates, precision=precision)
    for order in itertools.permutations(updates):
        assert torch.equal(merge_weight(weight, order, precision=precision), first)


def test_a_tensor_is_no_list_of_updates():
    for tensor in (torch.tensor(1.0), torch.ones(0), torch.ones(2, 2)):
        with pytest.raises(UpdateError, match="must be a sequence of LowRankUpdate"):
            merge_weight(torch.zeros(3, 4), tensor)

"""`exact` at the ends of float64 and beyond: numbers of any exponent, against rational numbers. LORAFOLD_FUZZ=9999 for a long run.

Whatever finite numbers are given, each element is the real sum rounded once: infinity from half a step above the largest number on,
never NaN; a sum too small for any number is a zero with its sign, and a sum of zero is +0.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel import rounding
from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu import loader, stream
from lorafold.kernel.cpu.stream import FileRows, merge_between
from lorafold.kernel.factors import stack
from lorafold.kernel.merge import merge_measured, merge_weight
from lorafold.kernel.update import LowRankUpdate
from onprocessor import COMPILER, OnProcessor
from oracle import GRID, exact_sum, round_fraction, same_bits

EXAMPLES = int(os.environ.get("LORAFOLD_FUZZ", "60"))
DTYPES = list(GRID)
PATHS = [None, *loader.builds()]
every_path = pytest.mark.parametrize("used", PATHS, ids=lambda used: used.name if used else "torch")


@pytest.fixture(scope="module", params=["all"], autouse=True)
def path():
    """These tests go through all paths themselves."""


def by(used, patch):
    for module in (native, rounding, stream):
        patch.setattr(module, "build", lambda: used)


def real_sums(weight, updates, dtype):
    """(out, in) float64: by fractions alone."""
    found = np.zeros(tuple(weight.shape))
    for i, j in np.ndindex(*found.shape):
        terms = [(u.scaling, float(u.lora_B[i, k].double()), float(u.lora_A[k, j].double())) for u in updates for k in range(u.r)]
        real = exact_sum(float(weight[i, j].double()), terms)
        found[i, j] = math.copysign(round_fraction(real, dtype), -1.0 if real < 0 else 1.0)
    return found


def finite(dtype):
    """Numbers of `dtype`: any, the ends of its range, short ones that make ties, and zeros."""
    info = torch.finfo(dtype)
    ends = [
        info.max,
        -info.max,
        info.tiny,
        -info.tiny,
        info.tiny * info.eps,
        -info.tiny * info.eps,
        1.0,
        -1.0,
        0.0,
        -0.0,
        1 + info.eps,
    ]
    smallest = round(math.log2(info.tiny * info.eps))
    powers = st.builds(
        lambda s, e: s * 2.0**e, st.sampled_from([1.0, -1.0, 1.5]), st.integers(smallest, round(math.log2(info.max)) - 1)
    )
    any_ = st.floats(-info.max, info.max, width=64 if dtype == torch.float64 else 32)
    return st.one_of(st.sampled_from(ends), powers, any_)


@st.composite
def cases(
    draw, weight_dtypes=tuple(DTYPES), factor_dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16), most=None
):
    dtype, factor = draw(st.sampled_from(weight_dtypes)), draw(st.sampled_from(factor_dtypes))
    rows, columns, ranks = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 3)),
        draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)),
    )

    def matrix(shape, dtype):
        numbers = finite(dtype)
        return torch.tensor([[draw(numbers) for _ in range(shape[1])] for _ in range(shape[0])], dtype=torch.float64).to(dtype)

    weight = matrix((rows, columns), dtype)
    weight = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))  # of rounding to a half
    scalings = st.one_of(st.sampled_from([1.0, 0.5, -2.0, 0.3]), finite(torch.float64))
    updates = []
    for r in ranks:
        a, b = matrix((r, columns), factor), matrix((rows, r), factor)
        a, b = (torch.where(x.isfinite(), x, torch.ones_like(x)) for x in (a, b))
        scaling = draw(scalings if most is None else st.sampled_from([1.0, -0.3, 2.0**-40, 2.0**40, 0.0]))
        if draw(st.booleans()):  # products that cancel, but perhaps for a trifle
            a, b = torch.cat([a, a]), torch.cat([b, -b], dim=1)
        updates.append(LowRankUpdate(a, b, scaling))
    return weight, updates


@every_path
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases(), target=st.sampled_from(DTYPES), in_place=st.booleans())
def test_in_memory(used, case, target, in_place):
    weight, updates = case
    out = torch.empty(weight.shape, dtype=target)
    start = weight.clone()
    if in_place and target == weight.dtype:
        out = start
    with pytest.MonkeyPatch.context() as patch:
        by(used, patch)
        merge_measured(start, updates, out=out, precision="exact")
    assert same_bits(out, real_sums(weight, updates, target))


@every_path
@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(case=cases(weight_dtypes=(torch.bfloat16, torch.float16, torch.float32)))
def test_from_file_to_file(used, case, tmp_path_factory):
    """What goes through has those bits; a row that does not is left to memory."""
    if used is None or used.stream() is None:
        return
    weight, updates = case
    file = tmp_path_factory.mktemp("f") / "weights"
    raw = weight.contiguous().view(torch.uint8).numpy().tobytes()
    file.write_bytes(raw + bytes(len(raw)))
    handle = os.open(file, os.O_RDWR)
    try:
        with pytest.MonkeyPatch.context() as patch:
            by(used, patch)
            ends = [FileRows(handle, start, weight.dtype, weight.shape[1]) for start in (0, len(raw))]
            done, _ = merge_between(ends[0], weight.shape[0], [ends[1]], [(stack(updates), 0)], precision="exact")
    finally:
        os.close(handle)
    merged = torch.frombuffer(bytearray(file.read_bytes()[len(raw) :]), dtype=weight.dtype).view(weight.shape)
    assert same_bits(merged[:done], real_sums(weight, updates, weight.dtype)[:done])


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return OnProcessor(lambda: tmp_path_factory.mktemp("variant"))


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    case=cases(
        weight_dtypes=(torch.bfloat16, torch.float16, torch.float32), factor_dtypes=(torch.float32, torch.bfloat16), most=128
    )
)
def test_on_a_gpu(processor, case):
    """By the kernel for GPUs, run on the processor: what it takes at all."""
    weight, updates = case
    with processor.working(usual=False):
        merged = merge_weight(weight, updates, precision="exact")
    assert same_bits(merged, real_sums(weight, updates, weight.dtype))


@every_path
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_absorbs_finite_products_however_large(used, dtype):
    weight = torch.tensor([[math.inf, -math.inf, 1.0]], dtype=dtype)
    update = LowRankUpdate(torch.full((1, 3), -1e200, dtype=torch.float64), torch.full((1, 1), 1e200, dtype=torch.float64), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        by(used, patch)
        assert merge_weight(weight, [update]).tolist() == [[math.inf, -math.inf, -math.inf]]


@every_path
def test_what_is_measured_stays_finite(used):
    """Where products overflow and cancel, the update is told from what it did."""
    weight = torch.ones(1, 1)
    a, b = torch.tensor([[1e200], [-1e200]], dtype=torch.float64), torch.tensor([[1e200, 1e200]], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        by(used, patch)
        merged, _ = merge_measured(weight, [LowRankUpdate(a, b, 1.0)])
    assert merged.item() == 1.0

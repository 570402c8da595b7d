"""However a tensor is cut into blocks, its bits are the same; memory depends on the block, not on the tensor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold
from lorafold.engine.blocks import BLOCK_BYTES, Block, block_bytes, blocks_of, compute, matrix_shape
from lorafold.engine.change import Change, cut
from lorafold.files.safetensors.info import TORCH_DTYPES
from lorafold.options import SumOptions
from lorafold.planning.plan import Addend, Step
from oracle import correctly_rounded, same_bits

FLOATS = ("BF16", "F16", "F32", "F64")


def merge_step(shape: tuple[int, ...], dtype: str, updates: int) -> Step:
    addends = tuple(Addend(i, "m", "weight", False, 1.0, "") for i in range(updates))
    return Step("w", "merge", dtype, shape, source="w", addends=addends)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5_000_000), max_size=4).map(tuple))
def test_blocks_cover_every_row_once_and_are_bounded(shape: tuple[int, ...]) -> None:
    step = Step("w", "cast", "BF16", shape, source="w")
    row = math.prod(shape[1:]) * 2
    if (shape[0] if shape else 1) * row > 2000 * BLOCK_BYTES:
        return  # too many to list here
    blocks = list(blocks_of(step))
    assert [block.start for block in blocks] == [sum(each.count for each in blocks[:i]) for i in range(len(blocks))]
    assert sum(block.count for block in blocks) == (shape[0] if shape else 1)
    assert all(block_bytes(block, "BF16") <= max(BLOCK_BYTES, row) for block in blocks)


@given(
    st.data(),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from(["nearest", "stochastic"]),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_cut_gives_the_same_bits(data: st.DataObject, source: str, dtype: str, rounding: str, count: int) -> None:
    rows, columns, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30)), data.draw(st.integers(0, 99))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows), max_size=5)) | {rows})
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(TORCH_DTYPES[source])
    updates = [
        lorafold.LowRankUpdate(torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator), 0.3 * r)
        for r in range(1, count + 1)
    ]
    step, options = merge_step((rows, columns), dtype, count), SumOptions("exact", rounding, seed)  # type: ignore[arg-type]
    change = Change(cut(rows, [(0, update) for update in updates]))
    whole, kept = compute(Block(step, 0, rows, columns), base, change, options)
    pieces = [
        compute(Block(step, start, stop - start, columns), base[start:stop], change, options)
        for start, stop in zip([0, *cuts], cuts, strict=False)
    ]
    assert torch.equal(torch.cat([piece for piece, _ in pieces]).view(torch.uint8), whole.view(torch.uint8))
    assert sum(each.dot for _, each in pieces) == pytest.approx(kept.dot, rel=1e-3, abs=1e-6)
    if rounding == "nearest" and updates:
        assert same_bits(whole, correctly_rounded(base, updates, TORCH_DTYPES[dtype]))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (4, 0), (2, 3, 4), (2, 0, 3)])
def test_tensors_of_every_form_can_be_cast(shape: tuple[int, ...]) -> None:
    step = Step("w", "cast", "BF16", shape, source="w")
    base = torch.randn(shape)
    blocks = list(blocks_of(step))
    rows, columns = matrix_shape(step)
    matrix, change = base.reshape(rows, columns), Change(cut(rows, []))
    parts = [compute(b, matrix[b.start : b.start + b.count], change, SumOptions())[0] for b in blocks]
    result = torch.cat(parts) if parts else torch.empty(shape, dtype=torch.bfloat16)
    assert torch.equal(result.view(shape), base.bfloat16())


@given(st.data(), st.sampled_from(["nearest", "stochastic"]))
@settings(max_examples=40, deadline=None)
def test_updates_of_some_rows_are_those_of_the_whole_with_zeros_elsewhere(data: st.DataObject, rounding: str) -> None:
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    base = torch.randn(rows, columns, generator=generator).bfloat16()
    placed, padded = [], []
    for r in range(1, data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        A, B = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
        B[:start], B[stop:] = 0, 0
        padded.append(lorafold.LowRankUpdate(A, B, 0.3 * r))
        placed.append((start, lorafold.LowRankUpdate(A, B[start:stop], 0.3 * r)))
    step, options = merge_step((rows, columns), "BF16", 1), SumOptions("exact", rounding, 7)  # type: ignore[arg-type]
    some = compute(Block(step, 0, rows, columns), base, Change(cut(rows, placed)), options)[0]
    whole = compute(Block(step, 0, rows, columns), base, Change(cut(rows, [(0, u) for u in padded])), options)[0]
    assert torch.equal(some, whole)

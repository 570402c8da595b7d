"""Codes times the scale of their block: against numpy, and rows of them against rows of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.checkpoints.encodings.scaled import BlockScaled, blocks
from lorafold.files.evaluation import evaluate, footprint, rows_of
from lorafold.files.expression import narrow, tensors_of
from lorafold.files.safetensors.info import NAMES, TensorInfo
from quantised import quantised, spread, stated

HELD: dict[str, Tensor] = {}


def info(name: str, tensor: Tensor) -> TensorInfo:
    HELD[name] = tensor
    return TensorInfo(name, NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size(), Path(name))


def read(found: TensorInfo) -> Tensor:
    whole = HELD[found.name]
    width = whole.element_size()
    return whole.reshape(-1)[found.start // width : found.stop // width].reshape(found.shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, int]]:
    stack = draw(st.sampled_from([(), (3,)]))
    return (*stack, draw(st.integers(1, 19)), draw(st.integers(1, 17))), (draw(st.integers(1, 8)), draw(st.integers(1, 8)))


@given(cases(), st.integers(0, 2**32), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_and_rows_of_them(case: tuple[tuple[int, ...], tuple[int, int]], seed: int, divides: bool) -> None:
    shape, block = case
    torch.manual_seed(seed)
    codes, scales = quantised(torch.randn(shape) + 0.1, block)
    stack = (1,) * (len(shape) - 2)
    node = BlockScaled(info("codes", codes), info("scales", scales), (*stack, *block), divides=divides)
    assert tuple(scales.shape) == blocks(shape, (*stack, *block))
    expected = stated(codes, scales, block)
    if divides:
        expected = codes.double().numpy() / spread(scales.double().numpy(), shape, block)
    found = evaluate(node, read)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), expected)
    for dim, size in enumerate(shape):
        start = seed % size
        count = min(size - start, 1 + seed // 7 % size)
        part = narrow(narrow(node, dim, start, count), dim, 0, count)
        assert np.array_equal(evaluate(part, read).numpy(), expected.take(range(start, start + count), dim))
    rows = int(np.prod(shape[:-1]))
    start = seed % rows
    part = rows_of(node, start, rows - start, shape[-1])
    assert np.array_equal(evaluate(part, read).numpy(), expected.reshape(rows, shape[-1])[start:])


def test_rows_read_what_they_need() -> None:
    """Rows 120 to 135 of blocks of 128 are of two blocks: their codes, and two rows of the scales."""
    codes, scales = quantised(torch.randn(576, 300), (128, 128))
    node = BlockScaled(info("codes", codes), info("scales", scales), (128, 128))
    part = narrow(node, 0, 120, 15)
    sizes = {each.name: each.shape for each in tensors_of(part)}
    assert sizes == {"codes": (15, 300), "scales": (2, 3)}
    assert footprint(part) < 15 * 300 * 16

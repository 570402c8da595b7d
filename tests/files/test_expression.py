"""Any part of any expression has the numbers that all of it has there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.files import evaluation
from lorafold.files.evaluation import evaluate, footprint, rows_of
from lorafold.files.expression import Cut, Diagonal, Identity, Joined, Matrix, Permuted, Reshaped, Zeros, narrow, tensors_of
from lorafold.files.products import Kron, Product, RowKron, Scaled, Times
from lorafold.files.safetensors.info import TensorInfo

SIZES = st.integers(1, 5)


def stored(shape: tuple[int, ...], start: int) -> TensorInfo:
    return TensorInfo("w", "F32", shape, start, start + 4 * math.prod(shape), Path("file"))


def read(info: TensorInfo) -> Tensor:
    """In a file where byte 4 i holds the number i."""
    return torch.arange(info.start // 4, info.stop // 4, dtype=torch.float32).reshape(info.shape)


@st.composite
def matrices(draw: st.DrawFn, depth: int = 3) -> Matrix:
    """Of two dimensions."""
    rows, columns = draw(SIZES), draw(SIZES)
    kinds = ["stored", "zeros", "identity"]
    kinds += [] if depth == 0 else ["permuted", "reshaped", "planes", "cut", "joined", "diagonal", "kron", "rowkron", "product"]
    kinds += [] if depth == 0 else ["times", "scaled"]
    kind = draw(st.sampled_from(kinds))
    if kind == "stored":
        return stored((rows, columns), 4 * draw(st.integers(0, 9)))
    if kind == "zeros":
        return Zeros((rows, columns))
    if kind == "identity":
        return Identity(rows)
    one = draw(matrices(depth=depth - 1))
    if kind == "permuted":
        return Permuted(one)
    if kind == "reshaped":
        width = draw(st.sampled_from([n for n in range(1, one.numel + 1) if one.numel % n == 0]))
        return Reshaped(one, (one.numel // width, width))
    if kind == "planes":
        return Reshaped(Permuted(Reshaped(one, (1, *one.shape)), draw(st.sampled_from([(1, 0, 2), (2, 1, 0)]))), one.shape[::-1])
    if kind == "cut":
        dim, step = draw(st.integers(0, 1)), draw(st.integers(1, 2))
        start = draw(st.integers(0, one.shape[dim] - 1))
        return Cut(one, dim, start, draw(st.integers(start + 1, one.shape[dim])), step)
    if kind == "scaled":
        return Scaled(one, 3.0)
    if kind == "joined":
        dim = draw(st.integers(0, 1))
        return Joined((one, Zeros(one.shape), one), dim)
    if kind == "times":
        return Times(one, Cut(one, draw(st.integers(0, 1)), 0, 1) if draw(st.booleans()) else one)
    if kind == "product":
        return Product(one, Permuted(one))
    other = draw(matrices(depth=depth - 1))
    if kind == "rowkron":
        return RowKron(one, Cut(Joined((other,) * one.shape[0]), 0, 0, one.shape[0]))
    return Diagonal((one, other)) if kind == "diagonal" else Kron(one, other)


@pytest.mark.parametrize("apart", [False, True])
@given(matrix=matrices(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_part_has_the_numbers_of_the_whole(apart: bool, matrix: Matrix, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_STRIDED", 0 if apart else 1 << 30)
        whole = evaluate(matrix, read)
        assert tuple(whole.shape) == matrix.shape
        dim = data.draw(st.integers(0, 1))
        start = data.draw(st.integers(0, matrix.shape[dim]))
        count = data.draw(st.integers(0, matrix.shape[dim] - start))
        part = narrow(matrix, dim, start, count)
        found = evaluate(part, read)
        assert (part.dtype, part.shape, part.nbytes) == (matrix.dtype, tuple(found.shape), found.nbytes)
        assert torch.equal(found, whole.narrow(dim, start, count))
        assert footprint(matrix) >= max([whole.nbytes, *(0 if apart else info.nbytes for info in tensors_of(matrix))])


@given(
    shape=st.lists(SIZES, min_size=0, max_size=4).map(tuple),
    turned=st.booleans(),
    leading=st.integers(0, 4),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_rows_of_any_number_of_columns(shape: tuple[int, ...], turned: bool, leading: int, data: st.DataObject) -> None:
    """Of a stored tensor they are one again, and read nothing else."""
    columns = math.prod(shape[min(leading, len(shape)) :])
    dims = tuple(reversed(range(len(shape))))
    matrix: Matrix = Permuted(stored(shape[::-1], 8), dims) if turned else stored(shape, 8)
    whole = evaluate(matrix, read).reshape(-1, columns)
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    part = rows_of(matrix, start, count, columns)
    assert part.shape == (count, columns)
    assert isinstance(part, TensorInfo) or turned
    assert torch.equal(evaluate(part, read), whole[start : start + count])


def test_rows_of_a_stack_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are stored transposed: some rows of two of them, and nothing of the others."""
    monkeypatch.setattr(evaluation, "_STRIDED", 0)
    seen: list[int] = []

    def counted(info: TensorInfo) -> Tensor:
        seen.append(info.numel)
        return read(info)

    stack = Permuted(stored((4, 6, 5), 0), (0, 2, 1))  # (4, 5, 6)
    found = evaluate(rows_of(stack, 8, 4, 6), counted)
    assert torch.equal(found, evaluate(stack, read).reshape(-1, 6)[8:12])
    assert sum(seen) == 4 * 6


def test_a_number_of_elements_that_ends_within_a_byte_is_not_cut_there() -> None:
    packed = TensorInfo("w", "F4", (3, 1), 0, 2, Path("file"))
    assert narrow(packed, 0, 1, 1) == Cut(packed, 0, 1, 2)

"""What was taken out of a weight: what it is, that it cannot be told where it is not determined, and what memory it takes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.adapters.adapter import Residual
from lorafold.engine.residual import taken_out
from lorafold.errors import AdapterError
from lorafold.kernel.merge import merge_weight
from peft_formulas import left_over

KINDS: tuple[Literal["pissa", "olora", "kasa"], ...] = ("pissa", "olora", "kasa")


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), data=st.data()
)
def test_what_is_left(rows: int, columns: int, seed: int, kind: Literal["pissa", "olora", "kasa"], data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(rows, columns) - (kind == "kasa")))
    W = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    update = taken_out(W, Residual(kind, r, 0.75), "w")
    assert update.shape == (rows, columns)
    found = (W + update.dense(torch.float64)).numpy()
    # numpy's decomposition errs by some 2⁻⁵² of the largest singular value (below 10), over the gap between those at the edge,
    # relative to it; numbers of a random generator are not nearer to each other than 2⁻²⁰ or so
    assert np.abs(found - left_over(W.numpy(), kind, r, 0.75)).max() < 1e-9


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_whatever_the_decomposition_is_off_by(
    kind: Literal["pissa", "olora", "kasa"], shape: tuple[int, int]
) -> None:
    """With rows and columns in another order LAPACK's results differ in their last bits; what is left, in float64, does not."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows, columns = torch.randperm(shape[0], generator=generator), torch.randperm(shape[1], generator=generator)
    if kind == "olora":  # which takes the first columns, in any order
        columns = torch.cat([columns[columns < 5], columns[columns >= 5]])
    found = []
    for matrix in (W, W[rows][:, columns].contiguous()):
        update = taken_out(matrix, Residual(kind, 5, 0.75), "w")
        found.append(merge_weight(matrix, [update], out=torch.empty_like(matrix), precision="exact"))
    assert torch.equal(found[0][rows][:, columns], found[1])


@pytest.mark.parametrize(
    ("kind", "W", "r", "part"),
    [
        ("pissa", torch.eye(4), 2, "its singular values 2 and 3 are the same"),
        ("kasa", torch.eye(4), 2, "its singular values 2 and 3 are the same"),
        ("olora", torch.ones(4, 4), 2, "its first 2 columns are not independent"),
        ("olora", torch.zeros(4, 4), 1, "its first 1 columns are not independent"),
        ("pissa", torch.ones(4, 4), 5, r"is \[4, 4\], of which nothing of rank 5 can be taken out"),
        ("kasa", torch.ones(4, 4), 4, "nothing of rank 4"),
    ],
)
def test_what_cannot_be_told(kind: Literal["pissa", "olora", "kasa"], W: torch.Tensor, r: int, part: str) -> None:
    with pytest.raises(AdapterError, match=part):
        taken_out(W, Residual(kind, r), "w")


def test_what_is_nothing_is_no_matter() -> None:
    """Where the singular values at the edge are all zero, it does not matter which of them are taken."""
    W = torch.outer(torch.arange(1.0, 5.0), torch.ones(6))
    for kind, r, left in (("pissa", 2, 0.0), ("kasa", 2, 1.0), ("pissa", 4, 0.0)):
        found = W + taken_out(W, Residual(kind, r), "w").dense(torch.float64)  # type: ignore[arg-type]
        assert torch.allclose(found, left * W.double(), rtol=0, atol=1e-14)

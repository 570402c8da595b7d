"""A tile of the base out of the merged one: every bit pattern, however it was rounded, and never more bytes than it has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold import LowRankUpdate, merge_weight
from lorafold.engine.undofile.tiles import BITS, NOTHING, WHOLE, EncodedTile, decode, encode, tile_bytes

INTEGER = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
DTYPES = st.sampled_from(list(INTEGER))


def bits(x: Tensor) -> Tensor:
    return x.view(INTEGER[x.dtype])


def update(rows: int, columns: int, size: float, seed: int) -> LowRankUpdate:
    random = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((2, columns), (rows, 2)))
    return LowRankUpdate(A.float(), (B * size).float(), 0.5)


@settings(max_examples=120, deadline=None)
@given(DTYPES, DTYPES, st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1e-3, 1.0, 1e30]), st.integers(0, 2**32))
def test_any_base_comes_back_from_any_merge(
    dtype: torch.dtype, out: torch.dtype, rows: int, columns: int, size: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    if seed % 2:  # any bits, NaN and infinity included
        width = torch.iinfo(INTEGER[dtype])
        base = torch.randint(width.min, width.max, (rows, columns), generator=random, dtype=INTEGER[dtype]).view(dtype)
    else:
        base = torch.randn(rows, columns, generator=random).mul_(0.02).to(dtype)
    added = [update(rows, columns, size, seed)]
    merged = merge_weight(base, added, out=torch.empty(rows, columns, dtype=out))
    tile = encode(base.clone(), merged.clone(), added)
    assert len(tile.data) <= base.nbytes
    assert len(tile.data) <= tile_bytes(tile.near, tile.far, base.numel(), dtype)
    again = decode(EncodedTile(tile.near, tile.far, bytearray(tile.data)), merged.clone(), added, (rows, columns), dtype)
    assert torch.equal(bits(again), bits(base))


def test_what_a_wider_dtype_holds_takes_nothing() -> None:
    base = torch.randn(8, 8).bfloat16()
    assert (encode(base, base.double(), ()).near, len(encode(base, base.double(), ()).data)) == (NOTHING, 0)
    assert encode(base, None, ()).near == WHOLE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.int32])
@pytest.mark.parametrize("changed", [0, 3, 640])
def test_codes_come_back_by_the_bits_in_which_they_differ(dtype: torch.dtype, changed: int) -> None:
    shape = (20, 32 // dtype.itemsize)
    base = torch.randint(0, 256, (640,), dtype=torch.uint8)
    merged = base.clone()
    merged[:changed] = torch.randint(0, 256, (changed,), dtype=torch.uint8)
    tile = encode(base.view(dtype).view(shape), merged.view(dtype).view(shape), ())
    assert tile.near == (BITS if changed < 640 else WHOLE)
    assert len(tile.data) <= tile_bytes(tile.near, tile.far, math.prod(shape), dtype)
    assert len(tile.data) < 40 or changed == 640
    again = decode(EncodedTile(tile.near, tile.far, bytearray(tile.data)), merged.view(dtype).view(shape), (), shape, dtype)
    assert torch.equal(again.reshape(-1).view(torch.uint8), base)
    with pytest.raises(ValueError, match=r"bytes are expected|data"):
        decode(EncodedTile(BITS, 0, bytearray(tile.data[:4])), merged.view(dtype).view(shape), (), shape, dtype)


@pytest.mark.parametrize(("near", "far"), [(5, 6), (-3, 0), (65, 0), (1, -1), (2**40, 0)])
def test_counts_that_cannot_be(near: int, far: int) -> None:
    assert tile_bytes(near, far, 64, torch.bfloat16) == -1


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 64), st.integers(0, 64))
def test_bytes_that_are_no_tile_raise(data: bytes, near: int, far: int) -> None:
    """Or give some numbers, which their hash then tells; never anything else."""
    if tile_bytes(near, far, 64, torch.bfloat16) < len(data):
        return
    merged = torch.zeros(8, 8).bfloat16()
    try:
        found = decode(EncodedTile(near, far, bytearray(data)), merged, (), (8, 8), torch.bfloat16)
    except (RuntimeError, ValueError, IndexError):
        return
    assert found.shape == (8, 8)

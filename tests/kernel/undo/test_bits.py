from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel.cpu.corrections import pack_native, unpack_native
from lorafold.kernel.undo.bits import checksum, code_bytes, from_order, pack, to_order, unpack

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", HALVES)
def test_every_bit_pattern_has_its_own_place(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    order = to_order(patterns.view(dtype))
    assert torch.equal(order.sort().values, patterns)
    assert torch.equal(from_order(order, dtype).view(torch.int16), patterns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_is_that_of_the_floats(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).sort().values
    assert torch.equal(to_order(x).sort().values, to_order(x))
    above = torch.nextafter(x.abs(), torch.full_like(x, torch.inf)) if dtype not in HALVES else None
    if above is not None:
        assert (to_order(above) - to_order(x.abs()) == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(-1, 1), st.integers(-(2**15), 2**15 - 1)), max_size=70), st.sampled_from(list(INTEGERS)))
def test_packing_loses_nothing(values: list[int], dtype: torch.dtype) -> None:
    integers = torch.tensor(values, dtype=INTEGERS[dtype])
    packed = pack(integers)
    assert torch.equal(unpack(packed), integers)
    assert packed.codes.numel() == -(-len(values) // 32) * 8
    assert packed.near.numel() == sum(abs(value) > 1 for value in values)
    assert packed.far.numel() == sum(abs(value) > 127 for value in values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_of_the_integers_survive(dtype: torch.dtype) -> None:
    info = torch.iinfo(INTEGERS[dtype])
    integers = torch.tensor([info.min, info.max, -1, 0, 1, 2, -2, 127, -127, 128, -128, -129], dtype=INTEGERS[dtype])
    assert torch.equal(unpack(pack(integers)), integers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_sees_every_bit_and_every_exchange(dtype: torch.dtype) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    seen = {checksum(x)}
    for bit in range(x.element_size() * 8):
        changed = x.clone().view(INTEGERS[dtype])
        changed[17] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(INTEGERS[dtype])
        seen.add(checksum(changed.view(dtype)))
    exchanged = x.clone()
    exchanged[[3, 40]] = exchanged[[40, 3]]
    seen.add(checksum(exchanged))
    assert len(seen) == x.element_size() * 8 + 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.sampled_from([1, 7, 63, 64, 65, 256, 257, 1000, 5000]),
    st.sampled_from([0, 1, 2, 200, 40000]),
    st.integers(0, 10**6),
)
def test_compiled_code_packs_and_restores_the_same(dtype: torch.dtype, n: int, step: int, seed: int) -> None:
    """Any bits, NaN and infinity among them, beside guesses that are off by up to so many steps, or by anything."""
    g = torch.Generator().manual_seed(seed)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    base = torch.randint(info.min, info.max, (n,), generator=g, dtype=integer)
    off = torch.randint(-step, step + 1, (n,), generator=g).to(integer)
    guess = from_order(to_order(base.view(dtype)) + off, dtype)
    codes = torch.empty(code_bytes(n), dtype=torch.uint8)
    found = pack_native(base.view(dtype), guess, codes)
    if found is None:  # without a compiler
        return
    wanted = pack(to_order(base.view(dtype)) - to_order(guess.clone().nan_to_num_(0.0, 0.0, 0.0)))
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.near, wanted.near)
    assert torch.equal(found.far, wanted.far)
    assert found.checksum == checksum(base.view(dtype))
    assert unpack_native(found.codes, found.near, found.far, guess, guess) == found.checksum
    assert torch.equal(guess.view(integer), base)

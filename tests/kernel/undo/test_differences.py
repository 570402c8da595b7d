"""What separates a base from a guess, packed and applied by every build as torch does it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.kernel.cpu import loader
from lorafold.kernel.cpu.loader import Build
from lorafold.kernel.undo import differences
from lorafold.kernel.undo.bits import Packed, from_order, to_order
from lorafold.kernel.undo.differences import apply, packed_difference

DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
each_way = pytest.mark.parametrize("build", [None, *loader.builds()], ids=lambda build: "torch" if build is None else build.name)


@each_way
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 300),
    dtype=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(["equal", "near", "some far", "any"]),
)
def test_it_comes_back_and_is_what_torch_packs(build: Build | None, seed: int, count: int, dtype: torch.dtype, kind: str) -> None:
    """Every bit pattern, NaN and both zeros included."""
    g, integer = torch.Generator().manual_seed(seed), DTYPES[dtype]
    info = torch.iinfo(integer)
    guess = torch.randint(info.min, info.max, (count,), generator=g, dtype=integer).view(dtype)
    steps = torch.randint(-1, 2, (count,), generator=g, dtype=integer)
    if kind == "equal":
        steps.zero_()
    elif kind == "some far":
        steps = torch.where(
            torch.rand(count, generator=g) < 0.1, torch.randint(-300, 300, (count,), generator=g).to(integer), steps
        )
    elif kind == "any":
        steps = torch.randint(info.min, info.max, (count,), generator=g, dtype=integer)
    base = from_order(to_order(guess) + steps, dtype)
    found = []
    for used in (None, build):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(differences, "build", lambda used=used: used)
            packed, differs = packed_difference(base, guess)
            assert torch.equal(apply(guess.clone(), packed).view(integer), base.view(integer))
        assert differs == bool((steps != 0).any())
        found.append(packed)
    one, other = found
    assert (one.n, one.codes.tolist(), one.near.tolist(), one.far.tolist()) == (
        other.n,
        other.codes.tolist(),
        other.near.tolist(),
        other.far.tolist(),
    )


@each_way
@pytest.mark.parametrize("what", ["near", "far", "more near", "more far", "codes"])
def test_what_does_not_fit_is_refused(build: Build | None, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a damaged file has it: fewer numbers than the codes say, or more."""
    monkeypatch.setattr(differences, "build", lambda: build)
    guess = torch.randn(100, generator=torch.Generator().manual_seed(0))
    base = from_order(to_order(guess) + torch.arange(100, dtype=torch.int32) * 4, torch.float32)
    good = packed_difference(base, guess)[0]
    near = {"near": good.near[:-1], "more near": torch.cat([good.near, good.near[:1]])}.get(what, good.near)
    far = {"far": good.far[:-1], "more far": torch.cat([good.far, good.far[:1]])}.get(what, good.far)
    codes = good.codes[:-8] if what == "codes" else good.codes
    with pytest.raises((ValueError, RuntimeError)):
        apply(guess, Packed(codes, near, far, good.n))

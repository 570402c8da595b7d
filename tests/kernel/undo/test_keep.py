"""Whatever is kept, the base comes back bit for bit; and where it cannot, nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorafold.kernel.undo.compact as compact
from lorafold.errors import LayerError
from lorafold.kernel.merge import merge_rows, merge_weight
from lorafold.kernel.undo.keep import UndoKind, merge_keeping
from lorafold.kernel.update import LowRankUpdate

KINDS: list[UndoKind] = ["copy", "copy-cpu", "compact"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def update(rows: int, columns: int, r: int, scale: float, seed: int = 0) -> LowRankUpdate:
    g = torch.Generator().manual_seed(seed)
    return LowRankUpdate(torch.randn(r, columns, generator=g), torch.randn(rows, r, generator=g) * scale, 0.75)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.sampled_from(["fast", "exact"]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e6]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_base_comes_back(
    kind: UndoKind,
    dtype: torch.dtype,
    precision: Any,
    rows: int,
    columns: int,
    adapters: int,
    scale: float,
    turned: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, rows, generator=g).to(dtype).T if turned else torch.randn(rows, columns, generator=g).to(dtype)
    base = weight.clone()
    updates = [update(rows, columns, 2, scale, seed + i) for i in range(adapters)]
    expected = merge_weight(base, updates, precision=precision, out=base.clone())  # strides decide how `fast` sums
    undo = merge_keeping(weight, updates, undo=kind, precision=precision)
    assert same_bits(weight, expected)
    assert same_bits(undo.restore(weight), base)
    assert same_bits(weight, expected)  # restoring does not write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_hard_to_restore(kind: UndoKind, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    hard = [
        0.0,
        -0.0,
        info.max,
        info.min,
        info.tiny,
        -info.tiny,
        info.smallest_normal / 4,
        torch.inf,
        -torch.inf,
        torch.nan,
        1.0,
        1e-7,
    ]
    weight = torch.tensor(hard, dtype=dtype).repeat(5, 1)
    base = weight.clone()
    undo = merge_keeping(weight, [update(5, len(hard), 3, info.max / 1e3 if dtype == torch.float16 else 1e4)], undo=kind)
    assert same_bits(undo.restore(weight), base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_does_not_depend_on_the_factors_after_merging(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8).to(dtype)
    base, u = weight.clone(), update(8, 8, 2, 0.1)
    undo = merge_keeping(weight, [u], undo="compact")
    u.lora_A.zero_()
    u.lora_B.fill_(torch.nan)
    assert same_bits(undo.restore(weight), base)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.16), (torch.float16, 0.16), (torch.float32, 0.09)])
def test_compact_keeps_little(dtype: torch.dtype, bound: float) -> None:
    """At r = 16 and ‖ΔW‖ = 0.05 ‖W‖, for a weight of 4096²; of a smaller one the factors are a larger share."""
    n, r = 1024, 16
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, n, generator=g) * 0.02).to(dtype)
    u = LowRankUpdate(torch.randn(r, n, generator=g), torch.randn(n, r, generator=g), 1.0)
    u = u.scaled(0.05 * float(weight.float().norm() / u.dense(torch.float32).norm()))
    size = weight.numel() * weight.element_size()
    undo = merge_keeping(weight, [u], undo="compact")
    factors = (u.lora_A.numel() + u.lora_B.numel()) * 4
    assert undo.nbytes - factors * (1 - n / 4096) < bound * size


@pytest.mark.parametrize("tile", [1, 21, 1 << 21])
def test_compact_in_tiles_of_any_size(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_TILE_BYTES", tile)
    weight = torch.randn(6, 5).to(torch.bfloat16)
    base = weight.clone()
    undo = merge_keeping(weight, [update(6, 5, 2, 0.1)], undo="compact")
    assert same_bits(undo.restore(weight), base)


def test_a_merged_weight_that_was_changed_is_noticed() -> None:
    weight = torch.randn(16, 16)
    undo = merge_keeping(weight, [update(16, 16, 2, 0.1)], undo="compact")
    weight[3, 5] += 1
    with pytest.raises(LayerError, match="rows 0 to 16 do not come out"):
        undo.restore(weight)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cannot_be_put_back_stays_merged(dtype: torch.dtype, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of several tiles was changed: those before it, which were put back, are merged again, to the same bits."""
    monkeypatch.setattr(compact, "_TILE_BYTES", 32 * 8 * dtype.itemsize)  # of eight rows, which the kernel does together
    weight = torch.randn(40, 32).to(dtype)
    base = weight.clone()
    undo = merge_keeping(weight, [update(40, 32, 2, 0.1)], undo="compact", precision=precision)
    whole = weight.clone()
    weight[39, 5] += 1
    merged = weight.clone()
    with pytest.raises(LayerError, match="rows 32 to 40 do not come out"):
        undo.put_back(weight)
    assert same_bits(weight, merged)
    undo.put_back(whole)
    assert same_bits(whole, base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_merge_that_fails_leaves_the_weight(kind: UndoKind, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel fails at its n-th call, once it has written half of what it should."""
    calls = 0

    def failing(block: Tensor, updates: Any, *, out: Tensor | None = None, **more: Any) -> Tensor:
        count(out)
        return merge_weight(block, updates, out=out, **more)

    def failing_rows(block: Tensor, factors: Any, first: int, *, out: Tensor, **more: Any) -> Any:
        count(out)
        return merge_rows(block, factors, first, out=out, **more)

    def count(out: Tensor | None) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            if out is not None:
                out[:1] = 0
            raise MemoryError

    monkeypatch.setattr("lorafold.kernel.undo.keep.merge_weight", failing)
    monkeypatch.setattr(compact, "merge_rows", failing_rows)
    monkeypatch.setattr(compact, "_TILE_BYTES", 20)  # two rows a tile, two calls each
    weight = torch.randn(4, 5).to(torch.bfloat16)
    base = weight.clone()
    try:
        merge_keeping(weight, [update(4, 5, 2, 0.1)], undo=kind)
    except MemoryError:
        assert same_bits(weight, base)
    else:
        assert kind != "compact"
        assert calls < call


def test_an_undo_moves_with_its_layer_but_for_one_kept_on_the_cpu() -> None:
    weight = torch.randn(4, 5)
    kept = {kind: merge_keeping(weight.clone(), [update(4, 5, 2, 0.1)], undo=kind) for kind in KINDS}
    meta = torch.device("meta")
    assert kept["copy"].to(meta).base.is_meta  # type: ignore[attr-defined]
    assert not kept["copy-cpu"].to(meta).base.is_meta  # type: ignore[attr-defined]
    moved: Any = kept["compact"].to(meta)
    assert moved.codes.is_meta
    assert moved.updates[0].lora_B.is_meta
    assert moved.tiles == kept["compact"].tiles  # type: ignore[attr-defined]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(LayerError, match="'copy', 'copy-cpu', 'compact', not 'none'"):
        merge_keeping(torch.zeros(2, 2), [], undo="none")  # type: ignore[arg-type]

"""Undo by a small correction: what separates the base from the number that subtracting ΔW gives.

Let Ŵ = round(W′ − ΔW), computed by the kernel in ``exact``, so that it has the same bits whenever and wherever it is
computed again, and let ord be the integer that orders the floats of a dtype. Then c = ord(W) − ord(Ŵ) is 0, 1 or −1 nearly
everywhere: two bits an element, and a list of the few others, restore W = ord⁻¹(ord(Ŵ) + c). The factors that were merged are
kept with them, and a checksum of W proves what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import LayerError
from ..arguments import check_updates, check_weight
from ..factors import Factors, stack
from ..merge import Precision, merge_rows, merge_weight
from ..update import LowRankUpdate
from .bits import Packed, checksum, code_bytes
from .differences import apply, packed_difference

_TILE_BYTES = 1 << 21
"""Of the weight, worked on at once: a few times that of scratch."""


class TileCorrection(NamedTuple):
    """How much of the correction belongs to one tile, and the checksum of its base."""

    n: int
    near: int
    far: int
    checksum: int


@dataclass(frozen=True, eq=False)
class CompactUndo:
    """The correction from round(W′ − ΔW) to W, of all tiles one after the other.

    - `updates`: what was merged, as copies
    - `codes`, `near`, `far`: as in `Packed`; single tensors, since thousands of small ones would break the heap into pieces
    - `tiles`: one entry a tile of rows
    - `precision`: with which it was merged
    """

    updates: tuple[LowRankUpdate, ...]
    codes: Tensor
    near: Tensor
    far: Tensor
    tiles: tuple[TileCorrection, ...]
    precision: Precision = "exact"

    @property
    def nbytes(self) -> int:
        factors = [factor for update in self.updates for factor in (update.lora_A, update.lora_B)]
        return sum(t.numel() * t.element_size() for t in (*factors, self.codes, self.near, self.far))

    def restore(self, merged: Tensor) -> Tensor:
        base = torch.empty_like(merged, memory_format=torch.contiguous_format)
        subtracted = _negative(self.updates)
        for rows, tile, packed in self._tiled(merged):
            _restore(merged, rows, subtracted, tile, packed, out=base[rows])
        return base

    def check(self, merged: Tensor) -> None:
        room = torch.empty_like(merged[: _step(merged)], memory_format=torch.contiguous_format)
        subtracted = _negative(self.updates)
        for rows, tile, packed in self._tiled(merged):
            _restore(merged, rows, subtracted, tile, packed, out=room[: rows.stop - rows.start])

    def put_back(self, merged: Tensor) -> None:
        room = torch.empty_like(merged[: _step(merged)], memory_format=torch.contiguous_format)
        subtracted = _negative(self.updates)
        done: list[slice] = []
        try:
            for rows, tile, packed in self._tiled(merged):
                merged[rows] = _restore(merged, rows, subtracted, tile, packed, out=room[: rows.stop - rows.start])
                done.append(rows)
        except BaseException:
            added = _stacked(self.updates)
            for rows in done:  # which are the base's, proven: merging makes the same bits of them again
                merge_rows(merged[rows], added, rows.start, out=merged[rows], precision=self.precision)
            raise

    def to(self, device: torch.device) -> CompactUndo:
        updates = [replace(u, lora_A=u.lora_A.to(device), lora_B=u.lora_B.to(device)) for u in self.updates]
        parts = {name: getattr(self, name).to(device) for name in ("codes", "near", "far")}
        return replace(self, updates=tuple(updates), **parts)

    def _tiled(self, merged: Tensor) -> Iterator[tuple[slice, TileCorrection, Packed]]:
        """The rows of each tile, and its correction, as views."""
        codes = near = far = 0
        for rows, tile in zip(_tiles(merged), self.tiles, strict=True):
            taken = code_bytes(tile.n)
            yield (
                rows,
                tile,
                Packed(
                    self.codes.narrow(0, codes, taken),
                    self.near.narrow(0, near, tile.near),
                    self.far.narrow(0, far, tile.far),
                    tile.n,
                ),
            )
            codes, near, far = codes + taken, near + tile.near, far + tile.far


def merge_keeping_correction(block: Tensor, updates: Sequence[LowRankUpdate], *, precision: Precision) -> CompactUndo:
    """Merge `updates` into `block` in place; returns what restores it. Where merging fails, `block` is as it was."""
    check_weight(block)
    checked = check_updates(block, updates, block)
    kept = [replace(u, lora_A=u.lora_A.detach().clone(), lora_B=u.lora_B.detach().clone()) for u in checked]
    added, subtracted = _stacked(kept), _negative(kept)
    sizes = [code_bytes(block[rows].numel()) for rows in _tiles(block)]
    codes = torch.empty(sum(sizes), dtype=torch.uint8, device=block.device)
    bases, guesses = (torch.empty_like(block[: _step(block)], memory_format=torch.contiguous_format) for _ in range(2))
    corrections: list[Packed] = []
    tiles: list[TileCorrection] = []
    for rows, room in zip(_tiles(block), torch.split(codes, sizes), strict=True):
        tile = block[rows]
        base, guess = bases[: tile.shape[0]].copy_(tile), guesses[: tile.shape[0]]
        try:
            merge_rows(tile, added, rows.start, out=tile, precision=precision)
            merge_rows(tile, subtracted, rows.start, out=guess, precision="exact")
            packed, summed = _packed(base, guess, room)
        except BaseException:
            tile.copy_(base)
            for done, taken in zip(_tiles(block), corrections, strict=False):
                block[done] = corrected(block[done], _narrowed(kept, done), taken, block.dtype)
            raise
        corrections.append(packed)
        tiles.append(TileCorrection(packed.n, packed.near.numel(), packed.far.numel(), summed))
    near, far = (torch.cat(parts) for parts in zip(*((c.near, c.far) for c in corrections), strict=True))
    return CompactUndo(tuple(kept), codes, near, far, tuple(tiles), precision)


def _packed(base: Tensor, guess: Tensor, codes: Tensor) -> tuple[Packed, int]:
    """What separates `base` from `guess`, with its codes in `codes`, and the checksum of `base`."""
    packed, _ = packed_difference(base, guess.nan_to_num_(0.0, 0.0, 0.0))
    return replace(packed, codes=codes.copy_(packed.codes)), checksum(base)


def _restore(
    merged: Tensor, rows: slice, subtracted: Factors | None, tile: TileCorrection, packed: Packed, *, out: Tensor
) -> Tensor:
    """`out`, filled with the base's `rows`; `merged` is all that merging left, `subtracted` the factors of −ΔW.

    Raises `LayerError` where they do not come out as they were.
    """
    merge_rows(merged[rows], subtracted, rows.start, out=out, precision="exact")
    restored = apply(out.nan_to_num_(0.0, 0.0, 0.0), packed)
    if restored is not out:
        out.copy_(restored)
    if checksum(out) != tile.checksum:
        raise LayerError(
            f"the base weight cannot be restored: rows {rows.start} to {rows.stop} do not come out with the checksum "
            "that they had before merging. The layer stays merged",
            hint="the merged weight was changed after merging; load the base weights again",
        )
    return out


def _negative(updates: Sequence[LowRankUpdate]) -> Factors | None:
    return _stacked([update.scaled(-1.0) for update in updates])


def _stacked(updates: Sequence[LowRankUpdate]) -> Factors | None:
    return stack(updates) if updates else None


def correction(base: Tensor, merged: Tensor, updates: Sequence[LowRankUpdate]) -> tuple[Packed, bool]:
    """c = ord(W) − ord(Ŵ), packed, what `corrected` makes `base` of again; and whether any of it is not zero.

    - `base`: W, (rows, in), any floating dtype; `merged`: W′, of the same shape and any floating dtype, however it was rounded
    - `updates`: what was added; with none, Ŵ is W′ rounded to base's dtype
    """
    return packed_difference(base, _subtracted(merged, updates, base.dtype))


def corrected(merged: Tensor, updates: Sequence[LowRankUpdate], packed: Packed | None, dtype: torch.dtype) -> Tensor:
    """The base, of `dtype`, of `merged` and `updates`; `packed` as `correction` gave it, None for zeros."""
    guess = _subtracted(merged, updates, dtype)
    return guess if packed is None else apply(guess, packed)


def tile_rows(columns: int, dtype: torch.dtype) -> int:
    """How many rows of a weight of so many columns are worked on at once."""
    return max(1, _TILE_BYTES // max(1, columns * dtype.itemsize))


def _subtracted(merged: Tensor, updates: Sequence[LowRankUpdate], dtype: torch.dtype) -> Tensor:
    """Ŵ = round(W′ − ΔW), the same bits every time; 0 where it would not be finite, since NaN has many bit patterns."""
    out = torch.empty(merged.shape, dtype=dtype, device=merged.device)
    guess = merge_weight(merged, [update.scaled(-1.0) for update in updates], out=out, precision="exact")
    return guess.nan_to_num_(0.0, 0.0, 0.0)


def _narrowed(updates: Sequence[LowRankUpdate], rows: slice) -> list[LowRankUpdate]:
    return [update.narrow(0, rows.start, rows.stop - rows.start) for update in updates]


def _step(block: Tensor) -> int:
    """Rows of a tile; those that the compiled kernel does together are not divided, so that factors are packed once for all."""
    step = tile_rows(block.shape[1], block.dtype)
    return step - step % 8 if step > 8 else step


def _tiles(block: Tensor) -> Iterator[slice]:
    step = _step(block)
    for start in range(0, block.shape[0], step):
        yield slice(start, min(start + step, block.shape[0]))

"""What a tile of a changed tensor differs by, as bytes: nothing, packed integers, or the base's own bytes where those are fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensorfile import bytes_of, tensor_over
from ..undo import Packed, code_bytes, corrected, correction, pack, unpack
from ..update import LowRankUpdate
from .changed import Span

NOTHING, WHOLE = -1, -2


@dataclass(frozen=True, eq=False)
class Tile:
    """`near` and `far`: how many integers of the two kinds of `Packed`; `near` may be NOTHING or WHOLE. `parts`: the bytes."""

    near: int
    far: int
    parts: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return sum(len(part) for part in self.parts)


def tile_bytes(near: int, far: int, numel: int, dtype: torch.dtype) -> int:
    """The bytes of a tile of `numel` elements of `dtype` by its entry in the table; −1 for an entry that cannot be."""
    if near == NOTHING:
        return 0
    if near == WHOLE:
        return numel * dtype.itemsize
    return code_bytes(numel) + near + far * dtype.itemsize if 0 <= far <= near <= numel else -1


def encode(base: Tensor, merged: Tensor | None, updates: Sequence[LowRankUpdate]) -> Tile:
    """What `base` (rows, columns) differs from `merged` without `updates` by; without `merged`, all of it."""
    whole = bytes_of(base)
    if merged is None:
        return Tile(WHOLE, 0, (whole,))
    integers = correction(base, merged, updates)
    if not integers.any():
        return Tile(NOTHING, 0, ())
    packed = pack(integers)
    tile = Tile(packed.near.numel(), packed.far.numel(), tuple(bytes_of(part.contiguous()) for part in _parts(packed)))
    return tile if tile.nbytes < len(whole) else Tile(WHOLE, 0, (whole,))


def decode(
    data: bytearray,
    near: int,
    far: int,
    merged: Tensor | None,
    updates: Sequence[LowRankUpdate],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The base's rows again, of `shape` and `dtype`; `data`: the tile's bytes, as many as `tile_bytes` says."""
    if near == WHOLE or merged is None:
        return tensor_over(data, dtype, shape)
    if near == NOTHING:
        return corrected(merged, updates, None, dtype)
    n = shape[0] * shape[1]
    view, codes = memoryview(data), code_bytes(n)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    few = bytearray(view[codes + near : codes + near + far * dtype.itemsize])  # whose place need not be aligned
    packed = Packed(
        tensor_over(view[:codes], torch.uint8, (codes,)),
        tensor_over(view[codes : codes + near], torch.int8, (near,)),
        tensor_over(few, integer, (far,)),
        n,
    )
    return corrected(merged, updates, unpack(packed), dtype)


def narrowed(updates: Sequence[LowRankUpdate], span: Span, start: int) -> list[LowRankUpdate]:
    """The rows of `span` of updates of a piece that begins with row `start`."""
    return [update.narrow(0, span.start - start, span.stop - span.start) for update in updates]


def put_back(merged: Tensor, rows: tuple[Tensor, Tensor], span: Span) -> None:
    """Write into the tile `merged` of `span` the base's rows (indices, values) that were replaced in it."""
    indices, values = rows
    here = (indices >= span.start) & (indices < span.stop)
    merged[indices[here] - span.start] = values[here].to(merged.dtype)


def _parts(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    return packed.codes, packed.near, packed.far

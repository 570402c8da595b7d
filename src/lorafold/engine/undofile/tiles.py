"""What a tile of a changed tensor differs by, as bytes: nothing, packed integers, or the base's own bytes where those are fewer.

Packed integers take two bits each, and say little: nearly all are 0. Deflated once more they take a fraction of that. Of codes,
which are no numbers, it is the bits in which they differ, deflated.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...files.safetensors.buffers import bytes_of, tensor_over
from ...kernel.undo.bits import Packed, code_bytes
from ...kernel.undo.compact import corrected, correction
from ...kernel.update import LowRankUpdate
from .changed import Span

NOTHING, WHOLE, BITS = -1, -2, -3


_LEVEL = 1
"""Of deflating: the higher ones take several times as long for some percent. There is little to find but runs of one byte; looking
for nothing else is quicker, and makes less of it."""


@dataclass(frozen=True, eq=False)
class EncodedTile:
    """`near` and `far`: how many integers of the two kinds of `Packed`; `near` may be NOTHING, WHOLE or BITS. `data`: the bytes."""

    near: int
    far: int
    data: memoryview | bytes | bytearray


def tile_bytes(near: int, far: int, numel: int, dtype: torch.dtype) -> int:
    """The bytes of a tile of `numel` elements of `dtype` by its entry in the table; −1 for an entry that cannot be."""
    if near == NOTHING:
        return 0
    if near == WHOLE or (near == BITS and not is_number(dtype)):
        return numel * dtype.itemsize
    return code_bytes(numel) + near + far * dtype.itemsize if 0 <= far <= near <= numel else -1


def is_number(dtype: torch.dtype) -> bool:
    """Whether a difference of two of them says something, and not only in which bits they differ."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def encode(base: Tensor, merged: Tensor | None, updates: Sequence[LowRankUpdate]) -> EncodedTile:
    """What `base` (rows, columns) differs from `merged` without `updates` by; without `merged`, all of it."""
    whole = bytes_of(base)
    if merged is None:
        return EncodedTile(WHOLE, 0, whole)
    if not is_number(base.dtype):
        differing = tensor_over(bytearray(whole), torch.uint8, (len(whole),)).bitwise_xor_(merged.reshape(-1).view(torch.uint8))
        data = zlib.compress(bytes_of(differing), _LEVEL)
        return EncodedTile(BITS, 0, data) if len(data) < len(whole) else EncodedTile(WHOLE, 0, whole)
    packed, differs = correction(base, merged, updates)
    if not differs:
        return EncodedTile(NOTHING, 0, b"")
    data = b"".join(bytes_of(part.contiguous()) for part in (packed.codes, packed.near, packed.far))
    stream = zlib.compressobj(_LEVEL, strategy=zlib.Z_RLE)
    deflated = stream.compress(data) + stream.flush()
    data = deflated if len(deflated) < len(data) else data
    return EncodedTile(packed.near.numel(), packed.far.numel(), data) if len(data) < len(whole) else EncodedTile(WHOLE, 0, whole)


def decode(
    tile: EncodedTile, merged: Tensor | None, updates: Sequence[LowRankUpdate], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The base's rows again, of `shape` and `dtype`; the data of `tile` has as many bytes as `tile_bytes` says, or fewer.

    Raises `ValueError` or `RuntimeError` where they are not what they must be.
    """
    near, far = tile.near, tile.far
    data = bytearray(tile.data) if isinstance(tile.data, bytes) else tile.data
    if near == WHOLE or merged is None:
        return tensor_over(data, dtype, shape)
    if near == BITS:
        count = shape[0] * shape[1] * dtype.itemsize
        differing = tensor_over(_inflated(data, count), torch.uint8, (count,))
        return differing.bitwise_xor_(merged.reshape(-1).view(torch.uint8)).view(dtype).view(shape)
    if near == NOTHING:
        return corrected(merged, updates, None, dtype)
    n = shape[0] * shape[1]
    if len(data) < (size := tile_bytes(near, far, n, dtype)):
        data = _inflated(data, size)
    view, codes = memoryview(data), code_bytes(n)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    few = bytearray(view[codes + near : codes + near + far * dtype.itemsize])  # whose place need not be aligned
    packed = Packed(
        tensor_over(view[:codes], torch.uint8, (codes,)),
        tensor_over(view[codes : codes + near], torch.int8, (near,)),
        tensor_over(few, integer, (far,)),
        n,
    )
    return corrected(merged, updates, packed, dtype)


def narrowed(updates: Sequence[LowRankUpdate], span: Span, start: int) -> list[LowRankUpdate]:
    """The rows of `span` of updates of a piece that begins with row `start`."""
    return [update.narrow(0, span.start - start, span.stop - span.start) for update in updates]


def put_back(merged: Tensor, rows: tuple[Tensor, Tensor], span: Span) -> None:
    """Write into the tile `merged` of `span` the base's rows (indices, values) that were replaced in it."""
    indices, values = rows
    here = (indices >= span.start) & (indices < span.stop)
    merged[indices[here] - span.start] = values[here].to(merged.dtype)


def _inflated(data: memoryview | bytearray, size: int) -> bytearray:
    """The `size` bytes that were deflated; never more, whatever `data` holds."""
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, size)
    except zlib.error as cause:
        raise ValueError(str(cause)) from None
    if len(found) != size or not stream.eof:
        raise ValueError(f"{size} bytes are expected")
    return bytearray(found)

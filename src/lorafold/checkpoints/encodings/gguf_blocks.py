"""The blocks of GGUF: 32 or 256 numbers of a row in a few bytes, codes and their scales together.

Layouts and formulas are those of llama.cpp, ``ggml/src/ggml-quants.c`` (``dequantize_row_…``) and ``ggml-common.h``. A code may
have its bits in several bytes: a layout says for each part of a code in which bytes and at which bits it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...files.expression import Matrix, Node, narrow
from ...files.safetensors.info import TensorInfo
from .codebook import E2M1, Constant, Valued
from .complaints import require, unfit
from .encoded import Encoded
from .packed import PackedCodes
from .rewrite import encode_codes
from .scaled import BlockScaled
from .zeropoint import BlockShifted, shifted


@dataclass(frozen=True)
class Part:
    """Some bits of each code of a block: of code i they are the lowest `bits` of byte `places[i]` from bit `shifts[i]` on.

    - `up`: the bit of the code at which they stand
    """

    places: tuple[int, ...]
    shifts: tuple[int, ...]
    bits: int
    up: int = 0

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int, int], ...]:
        """First code, first byte, their number and the shift of codes whose bytes follow each other; of most layouts a few."""
        found: list[tuple[int, int, int, int]] = []
        for i, (place, shift) in enumerate(zip(self.places, self.shifts, strict=True)):
            first, byte, count, of = found[-1] if found else (0, 0, 0, -1)
            if (byte + count, of) == (place, shift):
                found[-1] = (first, byte, count + 1, of)
            else:
                found.append((i, place, 1, shift))
        return tuple(found)


@dataclass(frozen=True)
class Layout:
    """One type of block.

    - `size`: bytes of a block; `bits`: of a code, which `parts` give, together as many as there are numbers
    - `scales`: (…, blocks, size) uint8 to (…, blocks, n) float64, a scale for each of n groups of a block
    - `zero`: the code that stands for zero; `minima`: what is subtracted of each group afterwards, as `scales` has it
    - `signed`: codes are in two's complement; `table`: what they stand for, where that is not themselves
    """

    size: int
    bits: int
    parts: tuple[Part, ...]
    scales: Callable[[Tensor], Tensor]
    zero: int = 0
    minima: Callable[[Tensor], Tensor] | None = None
    signed: bool = False
    table: tuple[float, ...] = ()

    @property
    def numel(self) -> int:
        """How many numbers a block has."""
        return len(self.parts[0].places)


@dataclass(frozen=True)
class BlockCodes(PackedCodes):
    """The codes in blocks of the layout called `kind`, along the last dimension of `words`, which are bytes."""

    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        layout = LAYOUTS[self.kind]
        return (*self.words.shape[:-1], self.words.shape[-1] // layout.size * layout.numel)

    def value(self, *parts: Tensor) -> Tensor:
        layout = LAYOUTS[self.kind]
        blocks = _split(parts[0], layout.size)
        codes = torch.zeros(*blocks.shape[:-1], layout.numel, dtype=torch.uint8, device="cpu")
        for part in layout.parts:
            mask = (1 << part.bits) - 1
            if len(part.runs) > _FEW:
                codes |= (blocks[..., part.places] >> _bytes(part.shifts)).bitwise_and_(mask) << part.up
                continue
            for first, byte, count, shift in part.runs:
                bits = blocks[..., byte : byte + count]
                bits = bits if part.bits == 8 else (bits >> shift).bitwise_and_(mask)
                codes[..., first : first + count] |= bits << part.up if part.up else bits
        return (codes ^ 128 if layout.signed else codes).flatten(-2)

    def packed(self, integers: Tensor, words: Tensor) -> Tensor:
        layout = LAYOUTS[self.kind]
        blocks = _split(words, layout.size)
        codes = _split(integers ^ 128 if layout.signed else integers, layout.numel)
        if all(len(part.runs) <= _FEW for part in layout.parts):
            made = blocks.clone()
            for part in layout.parts:
                mask = (1 << part.bits) - 1
                for first, byte, count, shift in part.runs:
                    bits = codes[..., first : first + count]
                    bits = bits if part.bits == 8 else (bits >> part.up).bitwise_and_(mask) << shift
                    made[..., byte : byte + count].bitwise_and_(~(mask << shift) & 255).bitwise_or_(bits)
            return made.flatten(-2)
        codes = codes.int()
        new, taken = torch.zeros(2, *blocks.shape, dtype=torch.int32, device="cpu").unbind(0)
        for part in layout.parts:
            mask, places = (1 << part.bits) - 1, torch.tensor(part.places, dtype=torch.int64, device="cpu")
            shifts = torch.tensor(part.shifts, dtype=torch.int32, device="cpu")
            new.index_add_(-1, places, ((codes >> part.up) & mask) << shifts)
            taken.index_add_(-1, places, (torch.full_like(shifts, mask) << shifts).expand_as(codes))
        return ((blocks.int() & ~taken) | new).to(torch.uint8).flatten(-2)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim == len(self.words.shape) - 1:
            return super().narrow(dim, start, count)
        return replace(self, words=narrow(self.words, dim, start, count))


@dataclass(frozen=True)
class BlockNumbers(Node):
    """What stands once for each group of numbers, float64: scales, or minima, in blocks of the layout called `kind`."""

    words: Matrix
    kind: str
    minima: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        layout = LAYOUTS[self.kind]
        return (*self.words.shape[:-1], self.words.shape[-1] // layout.size * (layout.numel // group(self.kind)))

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.words,)

    def value(self, *parts: Tensor) -> Tensor:
        layout = LAYOUTS[self.kind]
        of = layout.minima if self.minima and layout.minima is not None else layout.scales
        return of(_split(parts[0], layout.size)).flatten(-2)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim == len(self.words.shape) - 1:
            return super().narrow(dim, start, count)
        return replace(self, words=narrow(self.words, dim, start, count))


def gguf_encoded(words: TensorInfo, kind: str) -> Encoded:
    """The weight in `words`, U8 of shape (…, bytes of a row), in blocks of the type that ggml calls `kind`, such as "Q4_K".

    Raises `CheckpointError` where a row is not of whole blocks.
    """
    layout = LAYOUTS[kind]
    require(words, ("U8",))
    if not words.shape or words.shape[-1] % layout.size:
        raise unfit(words, f"rows of whole blocks of {layout.size} bytes", f"shape {list(words.shape)}")
    codes: Matrix = BlockCodes(words, layout.bits, kind)
    ones = (1,) * (len(words.shape) - 1)
    if layout.table:
        codes = Valued(codes, Constant(layout.table))
    if layout.zero:
        codes = shifted(codes, layout.zero)
    decoded = BlockScaled(codes, BlockNumbers(words, kind), (*ones, group(kind)))
    if layout.minima is not None:
        decoded = BlockShifted(decoded, BlockNumbers(words, kind, minima=True), (*ones, group(kind)))
    return Encoded(f"GGUF {kind}", (words.name,), decoded, layout.size * 8 / layout.numel, encode=encode_codes)


def group(kind: str) -> int:
    """How many numbers have one scale in the layout called `kind`."""
    return {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}.get(kind, 32)


def _split(rows: Tensor, each: int) -> Tensor:
    """(…, n · each) as (…, n, each)."""
    return rows.reshape(*rows.shape[:-1], -1, each)


def _bytes(numbers: tuple[int, ...]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.uint8, device="cpu")


def _half(blocks: Tensor, at: int) -> Tensor:
    """(…, 1) float64: the float16 at byte `at` of each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).double()


def _power(blocks: Tensor) -> Tensor:
    """(…, 1) float64: two to the power of the first byte less 127."""
    return (blocks[..., :1].long() + (1023 - 127)).bitwise_left_shift_(52).view(torch.float64)


def _six_bits(blocks: Tensor, at: int, *, minima: bool) -> Tensor:
    """(…, 8): scales or minima of Q4_K and Q5_K in the 12 bytes from `at` on (``get_scale_min_k4``)."""
    q = blocks[..., at : at + 12]
    low, mid, high = q[..., :4], q[..., 4:8], q[..., 8:]
    if minima:
        return torch.cat((mid & 63, high >> 4 | mid >> 6 << 4), -1)
    return torch.cat((low & 63, high & 15 | low >> 6 << 4), -1)


def _scales_of_q3(blocks: Tensor) -> Tensor:
    """(…, 16): in the 12 bytes from 96 on four bits of each and then two, less 32."""
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    four = torch.cat((low & 15, low >> 4), -1)
    two = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
    return ((four | two << 4).double() - 32) * _half(blocks, 108)


def _halves(first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places and shifts of 32 codes of which byte j holds j and j + 16."""
    return tuple(first + i % 16 for i in range(32)), tuple(4 * (i // 16) for i in range(32))


def _bits_of(first: int) -> Part:
    """The fifth bits of 32 codes, in four bytes."""
    return Part(tuple(first + i // 8 for i in range(32)), tuple(i % 8 for i in range(32)), 1, 4)


_ALL = range(256)
_FOURS = Part(tuple(16 + 32 * (i // 64) + i % 32 for i in _ALL), tuple(4 * (i // 32 % 2) for i in _ALL), 4)
_FOURS_OF_Q5 = replace(_FOURS, places=tuple(place + 32 for place in _FOURS.places))
_FIFTHS = Part(tuple(16 + i % 32 for i in _ALL), tuple(i // 32 for i in _ALL), 1, 4)
_TWOS = tuple(2 * (i // 32 % 4) for i in _ALL)

_FEW = 16
"""Runs of bytes up to which they are taken one by one; else each code by itself."""

LAYOUTS: Mapping[str, Layout] = {
    "Q4_0": Layout(18, 4, (Part(*_halves(2), 4),), lambda b: _half(b, 0), zero=8),
    "Q4_1": Layout(20, 4, (Part(*_halves(4), 4),), lambda b: _half(b, 0), minima=lambda b: -_half(b, 2)),
    "Q5_0": Layout(22, 5, (Part(*_halves(6), 4), _bits_of(2)), lambda b: _half(b, 0), zero=16),
    "Q5_1": Layout(24, 5, (Part(*_halves(8), 4), _bits_of(4)), lambda b: _half(b, 0), minima=lambda b: -_half(b, 2)),
    "Q8_0": Layout(34, 8, (Part(tuple(range(2, 34)), (0,) * 32, 8),), lambda b: _half(b, 0), zero=128, signed=True),
    "Q2_K": Layout(
        84,
        2,
        (Part(tuple(16 + 32 * (i // 128) + i % 32 for i in _ALL), _TWOS, 2),),
        lambda b: _half(b, 80) * (b[..., :16] & 15),
        minima=lambda b: _half(b, 82) * (b[..., :16] >> 4),
    ),
    "Q3_K": Layout(
        110,
        3,
        (
            Part(tuple(32 + 32 * (i // 128) + i % 32 for i in _ALL), _TWOS, 2),
            Part(tuple(i % 32 for i in _ALL), tuple(i // 32 for i in _ALL), 1, 2),
        ),
        _scales_of_q3,
        zero=4,
    ),
    "Q4_K": Layout(
        144,
        4,
        (_FOURS,),
        lambda b: _half(b, 0) * _six_bits(b, 4, minima=False),
        minima=lambda b: _half(b, 2) * _six_bits(b, 4, minima=True),
    ),
    "Q5_K": Layout(
        176,
        5,
        (_FOURS_OF_Q5, _FIFTHS),
        lambda b: _half(b, 0) * _six_bits(b, 4, minima=False),
        minima=lambda b: _half(b, 2) * _six_bits(b, 4, minima=True),
    ),
    "Q6_K": Layout(
        210,
        6,
        (
            Part(tuple(64 * (i // 128) + i % 64 for i in _ALL), tuple(4 * (i // 64 % 2) for i in _ALL), 4),
            Part(tuple(128 + 32 * (i // 128) + i % 32 for i in _ALL), _TWOS, 2, 4),
        ),
        lambda b: _half(b, 208) * b[..., 192:208].contiguous().view(torch.int8),
        zero=32,
    ),
    "MXFP4": Layout(17, 4, (Part(*_halves(1), 4),), _power, table=E2M1),
}
"""The types of blocks that are decoded and written, by ggml's name."""

"""Integers of a few bits, packed into words: one little-endian bit stream, or the fields of each word in an order of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...files.expression import Matrix, Node, narrow
from ...files.safetensors.info import BITS


@dataclass(frozen=True)
class PackedCodes(Node):
    """Unsigned integers of `bits` each, uint8, several to each of `words`."""

    words: Matrix
    bits: int

    @property
    def dtype(self) -> str:
        return "U8"

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self.words,)

    def packed(self, integers: Tensor, words: Tensor) -> Tensor:
        """`words` with `integers`, uint8 of this shape, in the place of those that they hold; all other bits stay."""
        raise NotImplementedError


@dataclass(frozen=True)
class Unpacked(PackedCodes):
    """The integers in `words`, U8 or I32; where `bits`, 1 to 8, do not divide a word, integers straddle words.

    - `dim`: the dimension along which integers share words; `size`: how many there are along it
    - `offset`: bits of the first word along `dim` that come before the first integer
    - `order`: of the integers of one word, which field each is in, the lowest first; empty: as they come

    >>> from lorafold.files.expression import Zeros
    >>> Unpacked(Zeros((4, 3)), 4, 1, 24).shape
    (4, 24)
    """

    dim: int
    size: int
    offset: int = 0
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.words.shape
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    @property
    def _width(self) -> int:
        return BITS[self.words.dtype]

    def value(self, *parts: Tensor) -> Tensor:
        words, width = parts[0].movedim(self.dim, -1), self._width
        mask = (1 << self.bits) - 1
        if width % self.bits == 0:
            fields = self.order or range(width // self.bits)
            shifts = torch.tensor([field * self.bits for field in fields], dtype=words.dtype, device="cpu")
            every = (words.unsqueeze(-1) >> shifts).bitwise_and_(mask).to(torch.uint8).flatten(-2)
            first = self.offset // self.bits
            return every[..., first : first + self.size].movedim(-1, self.dim)
        places = self._places()
        wide = torch.nn.functional.pad(words.long() & ((1 << width) - 1), (0, 1))
        word = places.div(width, rounding_mode="floor")
        pairs = wide[..., word] | wide[..., word + 1] << width
        return ((pairs >> places % width) & mask).to(torch.uint8).movedim(-1, self.dim)

    def _places(self) -> Tensor:
        """(size,) int64: the bit at which each integer begins, counted from the first word."""
        places = torch.arange(self.size, dtype=torch.int64, device="cpu") * self.bits + self.offset
        if not self.order:
            return places
        within = torch.tensor(self.order, dtype=torch.int64, device="cpu")[places % self._width // self.bits]
        return places - places % self._width + within * self.bits

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        if dim != self.dim:
            return replace(self, words=narrow(self.words, dim, start, count))
        width, first = self._width, self.offset + start * self.bits
        low, high = first // width, -(-(first + count * self.bits) // width)
        return replace(self, words=narrow(self.words, dim, low, high - low), size=count, offset=first - low * width)

    def packed(self, integers: Tensor, words: Tensor) -> Tensor:
        old, width = words.movedim(self.dim, -1), self._width
        places = self._places()
        word, shift = places.div(width, rounding_mode="floor"), places % width
        new, taken = torch.zeros(2, *old.shape[:-1], old.shape[-1] + 1, dtype=torch.int64, device="cpu").unbind(0)
        field = torch.full_like(places, (1 << self.bits) - 1) << shift
        value = integers.movedim(self.dim, -1).long() << shift
        low = (1 << width) - 1
        for sums, bits in ((new, value), (taken, field.expand_as(value))):  # fields do not overlap: their sum is their union
            sums.index_add_(-1, word, bits & low).index_add_(-1, word + 1, bits >> width)
        wide = (old.long() & low & ~taken[..., :-1]) | new[..., :-1]
        wide = torch.where(wide >= 1 << (width - 1), wide - (1 << width), wide) if words.dtype.is_signed else wide
        return wide.to(words.dtype).movedim(-1, self.dim)

"""The bits of floats as ordered integers, small integers packed four to a byte, and a checksum of a tensor's bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_order(x: Tensor) -> Tensor:
    """The integers, of x's size and shape, that are ordered as the floats of `x`: neighbours differ by 1, −0 is before +0.

    Every bit pattern has its own integer, NaN included, so `from_order` gives back the same bits.

    >>> to_order(torch.tensor([-0.0, 0.0, 2**-133], dtype=torch.bfloat16))
    tensor([-1,  0,  1], dtype=torch.int16)
    """
    bits = x.contiguous().view(_INTEGERS[x.element_size()])
    sign = bits >> (x.element_size() * 8 - 1)  # 0, or −1: all bits set
    return sign.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def from_order(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats of `dtype` whose `to_order` is `order`."""
    sign = order >> (order.element_size() * 8 - 1)
    return sign.bitwise_and_(torch.iinfo(order.dtype).max).bitwise_xor_(order).view(dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """n integers, nearly all of them −1, 0 or 1.

    - `codes`: (⌈n/4⌉,) uint8, two bits each: the integer + 1, or 3 for one that is in `others`. Byte i holds the elements i,
      i + q, i + 2q and i + 3q, where q is the number of bytes
    - `others`: the rest of the integers, in the order of their elements
    - `n`: how many integers
    """

    codes: Tensor
    others: Tensor
    n: int

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.others.numel() * self.others.element_size()

    def to(self, device: torch.device) -> Packed:
        return Packed(self.codes.to(device), self.others.to(device), self.n)


def pack(integers: Tensor) -> Packed:
    """`integers` (any shape, a signed dtype), packed.

    >>> packed = pack(torch.tensor([0, 1, -1, 300, 0], dtype=torch.int16))
    >>> packed.codes.numel(), packed.others, unpack(packed)
    (2, tensor([300], dtype=torch.int16), tensor([  0,   1,  -1, 300,   0], dtype=torch.int16))
    """
    flat = integers.flatten()
    far = (flat < -1) | (flat > 1)
    codes = (flat + 1).masked_fill_(far, 3).to(torch.uint8)
    quarter = -(-flat.numel() // 4)
    codes = torch.nn.functional.pad(codes, (0, 4 * quarter - flat.numel()))
    low, second, third, high = codes.view(4, quarter)
    return Packed(low | second << 2 | third << 4 | high << 6, flat[far], flat.numel())


def unpack(packed: Packed) -> Tensor:
    """(n,) the integers that were packed."""
    codes = torch.stack([packed.codes >> shift & 3 for shift in (0, 2, 4, 6)]).flatten()[: packed.n]
    integers = codes.to(packed.others.dtype) - 1
    return integers.masked_scatter_(codes == 3, packed.others)


def checksum(x: Tensor) -> int:
    """A number of 64 bits that depends on every bit of `x` and on its place; the same on every device.

    Fletcher's: the sum of the bits read as integers, and the sum of those weighted by their place, each modulo 2³².

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    words = x.contiguous().flatten().view(_INTEGERS[x.element_size()]).to(torch.int64)
    place = torch.arange(1, words.numel() + 1, device=words.device)
    return (int(words.sum()) & 0xFFFFFFFF) << 32 | (int(place.mul_(words).sum()) & 0xFFFFFFFF)

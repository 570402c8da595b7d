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
    """n integers, nearly all of them −1, 0 or 1, and most of the others small.

    - `codes`: (⌈n/4⌉,) uint8, two bits each: the integer + 1, or 3 for one that is in `near`. Byte i holds the elements i, i + q,
      i + 2q and i + 3q, where q is the number of bytes
    - `near`: int8, those that are not −1, 0 or 1, in the order of their elements; −128 stands for one that is in `far`
    - `far`: the rest, in order, of the integers' own dtype
    - `n`: how many integers
    """

    codes: Tensor
    near: Tensor
    far: Tensor
    n: int

    @property
    def nbytes(self) -> int:
        return self.codes.numel() + self.near.numel() + self.far.numel() * self.far.element_size()

    def to(self, device: torch.device) -> Packed:
        return Packed(self.codes.to(device), self.near.to(device), self.far.to(device), self.n)


def pack(integers: Tensor) -> Packed:
    """`integers` (any shape, a signed dtype), packed.

    >>> packed = pack(torch.tensor([0, 1, -1, 300, 0, 2], dtype=torch.int16))
    >>> packed.codes.numel(), packed.near.tolist(), packed.far.tolist(), unpack(packed).tolist()
    (2, [-128, 2], [300], [0, 1, -1, 300, 0, 2])
    """
    flat = integers.flatten()
    other = (flat < -1) | (flat > 1)
    codes = (flat + 1).masked_fill_(other, 3).to(torch.uint8)
    quarter = -(-flat.numel() // 4)
    codes = torch.nn.functional.pad(codes, (0, 4 * quarter - flat.numel()))
    low, second, third, high = codes.view(4, quarter)
    others = flat[other]
    is_far = (others <= _FAR) | (others > 127)
    return Packed(
        codes=low | second << 2 | third << 4 | high << 6,
        near=others.masked_fill(is_far, _FAR).to(torch.int8),
        far=others[is_far],
        n=flat.numel(),
    )


def unpack(packed: Packed) -> Tensor:
    """(n,) the integers that were packed."""
    others = packed.near.to(packed.far.dtype).masked_scatter_(packed.near == _FAR, packed.far)
    codes = torch.stack([packed.codes >> shift & 3 for shift in (0, 2, 4, 6)]).flatten()[: packed.n]
    return (codes.to(others.dtype) - 1).masked_scatter_(codes == 3, others)


_FAR = -128


def checksum(x: Tensor) -> int:
    """A number of 64 bits that depends on every bit of `x` and on its place; the same on every device.

    Fletcher's: the sum of the bits read as integers of 16 or 32 bits, and the sum of those weighted by their place, each modulo 2³².

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    words = x.contiguous().flatten().view(torch.int16 if x.element_size() == 2 else torch.int32).to(torch.int64)
    place = torch.arange(1, words.numel() + 1, device=words.device)
    return (int(words.sum()) & 0xFFFFFFFF) << 32 | (int(place.mul_(words).sum()) & 0xFFFFFFFF)

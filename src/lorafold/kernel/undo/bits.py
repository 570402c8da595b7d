"""The bits of floats as ordered integers, small integers packed four to a byte, and a checksum of a tensor's bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def to_order(x: Tensor) -> Tensor:
    """The integers, of x's size and shape, that are ordered as the floats of `x`: neighbours differ by 1, −0 is before +0.

    Every bit pattern has its own integer, NaN included, so `from_order` gives back the same bits.

    >>> to_order(torch.tensor([-0.0, 0.0, 2**-133], dtype=torch.bfloat16))
    tensor([-1,  0,  1], dtype=torch.int16)
    """
    bits = x.contiguous().view(INTEGERS[x.element_size()])
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


def code_bytes(n: int) -> int:
    """The bytes of `Packed.codes` for `n` integers."""
    return -(-n // 32) * 8


def pack(integers: Tensor) -> Packed:
    """`integers` (any shape, a signed dtype), packed.

    >>> packed = pack(torch.tensor([0, 1, -1, 300, 0, 2], dtype=torch.int16))
    >>> packed.codes.numel(), packed.near.tolist(), packed.far.tolist(), unpack(packed).tolist()
    (8, [-128, 2], [300], [0, 1, -1, 300, 0, 2])
    """
    flat = integers.flatten()
    codes = (flat + 1).clamp_(-1, 3).bitwise_and_(3).to(torch.uint8)  # −1, which stands for all below, becomes 3 too
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 32))
    others = flat[_threes(codes)]
    is_far = (others <= _FAR) | (others > 127)
    low, second, third, high = codes.view(4, -1)
    return Packed(
        codes=low | second << 2 | third << 4 | high << 6,
        near=others.masked_fill(is_far, _FAR).to(torch.int8),
        far=others[is_far],
        n=flat.numel(),
    )


def unpack(packed: Packed) -> Tensor:
    """(n,) the integers that were packed."""
    others = packed.near.to(packed.far.dtype)
    others[packed.near == _FAR] = packed.far
    codes = torch.cat([packed.codes >> shift & 3 for shift in (0, 2, 4, 6)])
    integers = codes.to(others.dtype).sub_(1)
    integers[_threes(codes)] = others
    return integers[: packed.n]


def _threes(codes: Tensor) -> Tensor:
    """The places in `codes`, (a multiple of 8,) of 0 to 3, that hold a 3. Few do, so words of eight are looked at first."""
    flags = codes >> 1 & codes
    words = flags.view(torch.int64).nonzero()  # (m, 1)
    places = (words * 8 + torch.arange(8, device=codes.device)).flatten()
    return places[flags[places] != 0]


_FAR = -128


def checksum(x: Tensor) -> int:
    """A number of 128 bits that depends on every bit of `x` and, but for rare coincidences, on its place; the same on every device.

    The bits are read as integers of 64 and laid out in rows. The sums of rows, and those of columns, are weighted by odd numbers
    and added modulo 2⁶⁴: no change of a single bit goes unseen by either.

    >>> checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([2.0, 1.0]))
    False
    """
    octets = x.contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(octets, (0, -octets.numel() % (8 * _ROW))).view(torch.int64).view(-1, _ROW)
    sums = [words.sum(dim=dim) for dim in (0, 1)]
    by_column, by_row = (int((s * torch.arange(1, 2 * s.numel(), 2, device=s.device)).sum()) for s in sums)
    return by_column << 64 ^ by_row


_ROW = 256

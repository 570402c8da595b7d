"""HQQ: integers with scales and zero points that are no integers, of groups along either axis.

``W_q`` holds the matrix of groups, (groups, group_size) for axis 1 and (group_size, groups) for axis 0, cut into as many equal
slices of rows as there are fields in a word; the first slice is in the highest field (`hqq/core/bitpack.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...files.expression import Joined, Matrix, Reshaped, narrow
from ...files.safetensors.info import TensorInfo
from .complaints import FLOATS, partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .packed import PackedCodes
from .scaled import BlockScaled
from .zeropoint import BlockShifted

_FIELDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""How many integers of so many bits a word holds."""

_INTEGERS = ("U8", "I8", "I32", "I64", "BOOL")


@dataclass(frozen=True)
class Field(PackedCodes):
    """The integers that stand at bit `shift` of each of `words`."""

    shift: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.words.shape

    def value(self, *parts: Tensor) -> Tensor:
        return (parts[0] >> self.shift).bitwise_and_((1 << self.bits) - 1).to(torch.uint8)

    def narrow(self, dim: int, start: int, count: int) -> Matrix:
        return replace(self, words=narrow(self.words, dim, start, count))


def find_hqq(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights of HQQ. Raises `CheckpointError` where their tensors do not fit, or scales are quantised themselves."""
    for name, words in stored.items():
        prefix, last = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
        if last == "W_q":
            yield f"{prefix}weight", _encoded(stored, prefix, words, read)


def _encoded(stored: Stored, prefix: str, words: TensorInfo, read: Read) -> Encoded:
    bits, axis = (_number(partner(stored, words, f"{prefix}{each}"), read) for each in ("nbits", "axis"))
    if bits not in _FIELDS or axis not in (0, 1):
        raise unfit(words, "1, 2, 3, 4 or 8 bits along axis 0 or 1", f"{bits} bits along axis {axis}")
    for meta in (f"{prefix}quant_scale", f"{prefix}quant_zero"):
        if meta in stored and _number(stored[meta], read):
            raise unfit(stored[meta], "0: scales and zero points as numbers", 1)
    stated = require(partner(stored, words, f"{prefix}shape"), ("I64", "I32"), (2,))
    shape = tuple(int(size) for size in read(stated).tolist())
    scales = require(partner(stored, words, f"{prefix}scale"), FLOATS)
    zeros = require(partner(stored, words, f"{prefix}zero"), FLOATS, scales.shape)
    groups, numel = scales.numel, math.prod(shape)
    if min(shape) < 1 or not groups or numel % groups or scales.shape != ((groups, 1) if axis else (1, groups)):
        raise unfit(scales, f"one scale for each group of {list(shape)}, along axis {axis}", f"shape {list(scales.shape)}")
    matrix = (groups, numel // groups) if axis else (numel // groups, groups)
    fields, dtype = _FIELDS[bits], "I32" if bits == 3 else "U8"
    each = -(-matrix[0] // fields)
    if words.nbytes != each * matrix[1] * (4 if bits == 3 else 1):
        raise unfit(words, f"{dtype} {[each, matrix[1]]}", f"{words.dtype} {list(words.shape)}")
    raw = replace(words, dtype=dtype, shape=(each, matrix[1]))
    slices = tuple(Field(raw, bits, bits * (fields - 1 - i)) for i in range(fields))
    codes = narrow(Joined(slices), 0, 0, matrix[0])
    block = (1, matrix[1]) if axis else (matrix[0], 1)
    decoded = Reshaped(BlockScaled(BlockShifted(codes, zeros, block), scales, block), shape)
    own = [words.name, scales.name, zeros.name]
    own += [f"{prefix}{meta}" for meta in _META if f"{prefix}{meta}" in stored]
    return Encoded(f"HQQ int{bits}", tuple(own), decoded, bits)


_META = (
    "nbits",
    "group_size",
    "axis",
    "shape",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
"""Names of the tensors in which HQQ keeps what is no tensor."""


def _number(info: TensorInfo, read: Read) -> int:
    require(info, _INTEGERS, (), (1,))
    return int(read(info).reshape(-1)[0])

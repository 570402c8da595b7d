"""Integers of compressed-tensors: 2 to 8 bits packed into I32, or one byte each; symmetric or with zero points; groups, act-order.

Packed codes are unsigned, stored with 2^(bits − 1) added, zero points likewise; of each row's bits one little-endian stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...files.expression import Matrix
from ...files.safetensors.info import TensorInfo
from .codebook import Gathered
from .complaints import FLOATS, partner, require, unfit
from .encoded import Config, Encoded, Read, Stored
from .groups import grouped_index, in_shape
from .packed import Unpacked
from .rewrite import encode_codes
from .scaled import BlockScaled
from .zeropoint import BlockShifted, shifted


@dataclass(frozen=True)
class _Integers:
    """Codes of one weight, (rows, columns), with what belongs to them; `index`: the group of each column, where that is stored."""

    codes: Matrix
    scales: TensorInfo
    zeros: Matrix | None
    index: TensorInfo | None
    names: tuple[str, ...]


def find_compressed(stored: Stored, config: Config, read: Read) -> Iterator[tuple[str, Encoded]]:
    """The weights of integers as compressed-tensors stores them. Raises `CheckpointError` where their tensors do not fit."""
    for name, info in stored.items():
        prefix, last = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
        if last == "weight_packed" and info.dtype == "I32":
            bits, integers = _packed(stored, prefix, info, config, read)
            yield f"{prefix}weight", _encoded(f"int{bits} of compressed-tensors", integers, bits, read)
        elif last == "weight" and info.dtype == "I8" and f"{prefix}weight_scale" in stored:
            yield name, _encoded("int8 with scales", _bytes(stored, prefix, info), 8, read)


def _packed(stored: Stored, prefix: str, words: TensorInfo, config: Config, read: Read) -> tuple[int, _Integers]:
    """Bits of a code, and the codes of several to a word."""
    if len(words.shape) != 2:
        raise unfit(words, "a matrix", f"shape {list(words.shape)}")
    stated = require(partner(stored, words, f"{prefix}weight_shape"), ("I64", "I32"), (2,))
    rows, columns = (int(size) for size in read(stated).tolist())
    if rows != words.shape[0] or not 0 < columns <= words.shape[1] * 16:
        raise unfit(stated, f"{words.shape[0]} rows of at most {words.shape[1] * 16} columns", [rows, columns])
    bits = _bits(words, columns, config)
    codes: Matrix = Unpacked(words, bits, 1, columns)
    scales = require(partner(stored, words, f"{prefix}weight_scale"), FLOATS)
    stored_zeros, index = (stored.get(f"{prefix}{each}") for each in ("weight_zero_point", "weight_g_idx"))
    zeros: Matrix | None = stored_zeros
    if stored_zeros is not None and stored_zeros.dtype == "I32":
        across = scales.shape[1:] or (1,)
        packed = require(stored_zeros, ("I32",), (-(-rows * bits // 32), *across))
        zeros = Unpacked(packed, bits, 0, rows)
    else:
        codes = shifted(codes, 1 << (bits - 1))
        zeros = None if stored_zeros is None else require(stored_zeros, ("I8",), scales.shape)
    there = (words, scales, stated, stored_zeros, index)
    return bits, _Integers(codes, scales, zeros, index, tuple(each.name for each in there if each is not None))


def _bytes(stored: Stored, prefix: str, codes: TensorInfo) -> _Integers:
    """Codes of a byte each."""
    if len(codes.shape) != 2:
        raise unfit(codes, "a matrix", f"shape {list(codes.shape)}")
    scales = require(stored[f"{prefix}weight_scale"], FLOATS)
    zeros, index = (stored.get(f"{prefix}{each}") for each in ("weight_zero_point", "weight_g_idx"))
    if zeros is not None:
        require(zeros, ("I8",), scales.shape)
    there = (codes, scales, zeros, index)
    return _Integers(codes, scales, zeros, index, tuple(each.name for each in there if each is not None))


def _encoded(label: str, found: _Integers, bits: int, read: Read) -> Encoded:
    """The weight of the codes, less zero points, times scales: one, one a row, or one for each group of columns."""
    codes, scales = found.codes, found.scales
    rows, columns = codes.shape
    grids = {(): (rows, columns), (1,): (rows, columns), (1, 1): (rows, columns), (rows, 1): (1, columns), (rows,): (1, columns)}
    block = grids.get(scales.shape)
    if block is None:
        if len(scales.shape) != 2 or scales.shape[0] != rows or not scales.shape[1] or columns % scales.shape[1]:
            raise unfit(scales, f"one scale, {[rows, 1]}, or whole groups of {columns} columns", f"shape {list(scales.shape)}")
        block = (1, columns // scales.shape[1])
    grid = (rows // block[0], columns // block[1])
    seen, zeros = in_shape(scales, grid), None if found.zeros is None else in_shape(found.zeros, grid)
    order = None if found.index is None else grouped_index(found.index, columns, block[1], grid[1], read)
    if order is not None:
        seen, zeros, block = Gathered(seen, order, 1), None if zeros is None else Gathered(zeros, order, 1), (block[0], 1)
    if zeros is not None:
        codes = BlockShifted(codes, zeros, block)
    return Encoded(label, found.names, BlockScaled(codes, seen, block), bits, encode=encode_codes)


def _bits(words: TensorInfo, columns: int, config: Config) -> int:
    """Bits of a code: those with which so many columns take so many words; by the configuration where that leaves several."""
    possible = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words.shape[1]]
    groups = config.get("config_groups")
    weights = [each.get("weights") for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
    stated: set[Any] = {each.get("num_bits") for each in weights if isinstance(each, Mapping)}
    if len(possible) > 1:
        possible = [bits for bits in possible if bits in stated]
    if len(possible) != 1:
        raise unfit(words, f"words for {columns} columns of 1 to 8 bits each, or the bits in the configuration", list(words.shape))
    return possible[0]

"""Which rows of a quantised weight compiled code decodes and encodes, told from the nodes that they are made of.

What is not told here, `evaluate` and `encoded_again` do with torch, with the same bits.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...arithmetic import undisturbed
from ...files.evaluation import evaluate
from ...files.expression import Cut, Matrix, Reshaped
from ...files.safetensors.info import TensorInfo
from ...kernel.cpu.codes import Codes, How, Spread
from ...kernel.cpu.recoding import CodeRule
from .codebook import Valued
from .encoded import Encoded, Read
from .fp8 import encode_fp8
from .packed import PackedCodes, Unpacked
from .rewrite import encode_codes, values_of
from .scaled import BlockScaled
from .zeropoint import BlockShifted

_FLOATING = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}
"""Mantissa bits and the smallest exponent."""

_BYTES = (*_FLOATING, torch.int8, torch.uint8)


def coded_rows(rows: Matrix, count: int, columns: int, read: Read) -> tuple[TensorInfo, Codes] | None:
    """Where the codes of `rows`, as `rows_of` makes them, lie together, and how numbers are made of them; None where they do not.

    - `count`, `columns`: the shape of `rows`
    """
    with undisturbed():
        return _coded_rows(rows, count, columns, read)


def _coded_rows(rows: Matrix, count: int, columns: int, read: Read) -> tuple[TensorInfo, Codes] | None:
    spreads: list[Spread] = []
    node, table = rows, None
    while not isinstance(node, TensorInfo | PackedCodes):
        if isinstance(node, Reshaped | Cut) and node.numel == node.of.numel:
            node = node.of
        elif type(node) in (BlockScaled, BlockShifted) and isinstance(node, BlockScaled):
            spread = _spread(node, count, columns, read)
            if spread is None:
                return None
            spreads.append(spread)
            node = node.codes
        elif isinstance(node, Valued):
            table, node = evaluate(node.table, read).double(), node.codes
        else:
            return None
    spreads.reverse()
    if isinstance(node, Unpacked):
        return _packed(node, count, columns, table, tuple(spreads))
    if isinstance(node, PackedCodes) or node.torch_dtype not in _BYTES or node.numel != count * columns:
        return None
    numbers = _of_bytes(node.torch_dtype) if table is None else _padded(table, 256)
    return node, Codes(8, columns, columns, numbers, tuple(spreads))


def _packed(
    node: Unpacked, count: int, columns: int, table: Tensor | None, spreads: tuple[Spread, ...]
) -> tuple[TensorInfo, Codes] | None:
    """Those of integers that share words, where each row of them is whole bytes."""
    words, bits = node.words, node.bits
    if not isinstance(words, TensorInfo) or bits not in (1, 2, 4, 8) or columns * bits % 8 or node.offset % 8:
        return None
    low, high = tuple(range(8 // bits)), tuple(reversed(range(8 // bits)))
    if node.dim != len(node.shape) - 1 or not (node.order in ((), low) or (words.dtype in ("U8", "I8") and node.order == high)):
        return None
    start, row_bytes = words.start + node.offset // 8, columns * bits // 8
    if len(node.shape) > 1:
        row_bytes = words.nbytes // count
        if (
            node.offset
            or node.shape[-1] != columns
            or math.prod(node.shape) != count * columns
            or row_bytes * count != words.nbytes
        ):
            return None
    elif node.size != count * columns:
        return None
    numbers = torch.arange(1 << bits, dtype=torch.float64, device="cpu") if table is None else _padded(table, 1 << bits)
    place = TensorInfo(words.name, "U8", (count * row_bytes,), start, start + count * row_bytes, words.path)
    return place, Codes(bits, columns, row_bytes, numbers, spreads, high_first=bool(node.order) and node.order == high)


def _spread(node: BlockScaled, count: int, columns: int, read: Read) -> Spread | None:
    """What `node` does to its codes; None where its blocks are not those of a matrix."""
    scales = evaluate(node.scales, read).double()
    how: How = "subtract" if isinstance(node, BlockShifted) else "divide" if node.divides else "multiply"
    skipped = node.skipped or (0,) * len(node.block)
    if len(node.shape) == 1 and node.numel == count * columns:
        whole = scales.numel() == 1
        return Spread(how, scales.reshape(1, -1), (None, None) if whole else (0, node.block[0]), (0, 0 if whole else skipped[0]))
    if node.shape[-2:] != (count, columns) or math.prod(node.shape[:-2]) != 1 or any(size > 1 for size in scales.shape[:-2]):
        return None
    grid = scales.reshape(scales.shape[-2:])
    down, across = (None if size == 1 else block for size, block in zip(grid.shape, node.block[-2:], strict=True))
    return Spread(how, grid, (down, across), (0 if down is None else skipped[-2], 0 if across is None else skipped[-1]))


def code_rule(encoded: Encoded, rows: Matrix, read: Read) -> CodeRule | None:
    """Which code a number in `rows` gets; None where compiled code does not know.

    `rows`: of `encoded.natural`, such that `coded_rows` says where they lie.
    """
    if encoded.encode not in (encode_fp8, encode_codes):
        return None
    with undisturbed():
        return _code_rule(encoded, rows, read)


def _code_rule(encoded: Encoded, rows: Matrix, read: Read) -> CodeRule | None:
    node = rows
    while isinstance(node, Reshaped | Cut | BlockScaled):
        node = node.codes if isinstance(node, BlockScaled) else node.of
    if isinstance(node, TensorInfo):
        kind = node.torch_dtype
        return None if kind is None else _rule_of_bytes(kind, signed=encoded.encode is encode_fp8)
    if isinstance(node, Valued):
        return _rule_of_table(tuple(evaluate(node.table, read).tolist()))
    return _rule_of_integers(node.bits) if isinstance(node, PackedCodes) else None


@lru_cache
def _rule_of_bytes(kind: torch.dtype, *, signed: bool) -> CodeRule:
    table = _of_bytes(kind)
    values, names = values_of(table)
    both = names.expand(2, -1).clone()
    if signed:
        both[1, values == 0] = 128
    return CodeRule(table, values, both, _FLOATING.get(kind))


@lru_cache
def _rule_of_table(numbers: tuple[float, ...]) -> CodeRule:
    table = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    values, names = values_of(table)
    return CodeRule(table, values, names.expand(2, -1).contiguous())


@lru_cache
def _rule_of_integers(bits: int) -> CodeRule:
    return _rule_of_table(tuple(float(code) for code in range(1 << bits)))


@lru_cache
def _of_bytes(kind: torch.dtype) -> Tensor:
    """(256,) float64: the numbers of the codes of a type of eight bits."""
    return torch.arange(256, dtype=torch.int16, device="cpu").to(torch.uint8).view(kind).double()


def _padded(table: Tensor, size: int) -> Tensor:
    """The first `size` numbers of `table`, NaN where there are fewer."""
    return torch.nn.functional.pad(table[:size], (0, max(0, size - table.shape[0])), value=math.nan)

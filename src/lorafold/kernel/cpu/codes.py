"""Rows of quantised weights as compiled code decodes them: codes of some bits, their numbers, and scales for blocks of them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .loader import Build, build
from .pointers import address

How = Literal["subtract", "multiply", "divide"]

_HOW: dict[How, int] = {"subtract": 0, "multiply": 1, "divide": 2}  # by_subtraction and so on in codes.h
_EVERYWHERE = 1 << 62
"""The size of a block that has no end."""


class _Spread(ctypes.Structure):
    """`struct spread` of codes.h, which says what the fields are."""

    _fields_ = [
        ("numbers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "rows", "columns", "row_skipped", "column_skipped", "how")),
    ]


class CodesStruct(ctypes.Structure):
    """`struct codes` of codes.h, which says what the fields are."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("each", "columns", "row_bytes")),
        ("spreads", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("room", ctypes.c_void_p),
    ]


class _Decoding(ctypes.Structure):
    """`struct decoding` of codes.h, which says what the fields are."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "from", "out")] + [("rows", ctypes.c_int64)]


@dataclass(frozen=True, eq=False)
class Spread:
    """Numbers that stand once for each block of a matrix, and what they do to every element of it.

    - `numbers`: (rows of blocks, blocks in a row) float64; `how`: what is done, ``"subtract"``, ``"multiply"`` or ``"divide"``
    - `block`: rows and columns of a block; None of both where one block is all of them. Where the rows are 0, blocks are so many
      numbers of all rows one after another, and `numbers` is (1, blocks)
    - `skipped`: rows and columns of the first block that lie before the matrix
    """

    how: How
    numbers: Tensor
    block: tuple[int | None, int | None]
    skipped: tuple[int, int] = (0, 0)

    def after(self, rows: int, columns: int) -> Spread:
        """That of the matrix without its first `rows`, of `columns` numbers each."""
        down, across = self.skipped
        return replace(self, skipped=(down, across + rows * columns) if self.block[0] == 0 else (down + rows, across))


@dataclass(frozen=True, eq=False)
class Codes:
    """How rows of codes lie, and what they stand for.

    - `bits`: of a code, 1, 2, 4 or 8; `high_first`: whether the first of those in a byte is in its highest bits
    - `columns`: codes of a row, which are whole bytes; `row_bytes`: of a row, which may end with others
    - `table`: (2^bits,) float64, the number of each code
    - `spreads`: what is done to the numbers, the first one first, each operation rounded to float64
    """

    bits: int
    columns: int
    row_bytes: int
    table: Tensor
    spreads: tuple[Spread, ...] = ()
    high_first: bool = False

    @property
    def shifts(self) -> list[int]:
        """The bit of its byte at which each code begins."""
        shifts = list(range(0, 8, self.bits))
        return shifts[::-1] if self.high_first else shifts

    def after(self, rows: int) -> Codes:
        """Those of the matrix without its first `rows`."""
        return replace(self, spreads=tuple(each.after(rows, self.columns) for each in self.spreads))


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows of a matrix whose `codes` lie one row behind the other in the file open as `fd`, from byte `start` on."""

    fd: int
    start: int
    codes: Codes

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return torch.float64

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        return self.codes.columns

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return self.codes.row_bytes

    def after(self, rows: int) -> CodedRows:
        """Those behind the first `rows`."""
        return replace(self, start=self.start + rows * self.row_bytes, codes=self.codes.after(rows))


class PackedCodes:
    """`codes` as compiled code reads them; `struct` is good as long as this lives."""

    def __init__(self, codes: Codes) -> None:
        self._tables = codes.table[_fields(codes)].contiguous()
        self._numbers = [each.numbers.contiguous() for each in codes.spreads]
        self._room = torch.empty(len(codes.spreads) * codes.columns, dtype=torch.float64, device="cpu")
        self._spreads = (_Spread * len(codes.spreads))()
        for struct, spread, numbers in zip(self._spreads, codes.spreads, self._numbers, strict=True):
            rows, columns = (_EVERYWHERE if size is None else size for size in spread.block)
            struct.numbers, struct.stride = address(numbers, torch.float64), numbers.shape[1]
            struct.rows, struct.columns, struct.how = rows, columns, _HOW[spread.how]
            struct.row_skipped, struct.column_skipped = spread.skipped
        self.struct = CodesStruct(
            address(self._tables, torch.float64),
            8 // codes.bits,
            codes.columns,
            codes.row_bytes,
            ctypes.addressof(self._spreads),
            len(codes.spreads),
            address(self._room, torch.float64),
        )


def _fields(codes: Codes) -> Tensor:
    """(256, codes of a byte) int64: the codes in each byte."""
    shifts = torch.tensor(codes.shifts, dtype=torch.int64, device="cpu")
    return torch.arange(256, dtype=torch.int64, device="cpu")[:, None] >> shifts & ((1 << codes.bits) - 1)


def decodes(used: Build, codes: Codes) -> bool:
    """Whether `used` has what it takes."""
    kinds = {"spread": _Spread, "codes": CodesStruct, "decoding": _Decoding}
    fits = all(used.number(f"{name}_bytes") == ctypes.sizeof(kind) for name, kind in kinds.items())
    return fits and len(codes.spreads) <= used.number("most_spreads") and not codes.columns * codes.bits % 8


def decode(codes: Codes, raw: Tensor, out: Tensor) -> bool:
    """Fill `out`, (rows, columns) float64, with the numbers of the rows of codes `raw`, contiguous; whether that was done.

    >>> table = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    >>> out = torch.zeros(1, 4, dtype=torch.float64)
    >>> decode(Codes(2, 4, 1, table), torch.tensor([[0b11100100]], dtype=torch.uint8), out), out
    (True, tensor([[0., 1., 2., 3.]], dtype=torch.float64))
    """
    used = build()
    if used is None or not decodes(used, codes) or raw.nbytes < out.shape[0] * codes.row_bytes:
        return False
    packed = PackedCodes(codes)
    job = _Decoding(ctypes.addressof(packed.struct), rows=out.shape[0])
    setattr(job, "from", address(raw, raw.dtype))
    job.out = address(out, torch.float64)
    used.library.lorafold_decode(ctypes.byref(job))
    return True

"""Codes decoded from one file, and cast or made codes again in another, in compiled code.

Wherever it does not apply, the functions say how far they came, and the rest is done with torch, with the same bits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...arithmetic import subnormal_numbers
from ..exact import UNIT
from ..factors import Factors
from ..rounding import Stochastic
from ..stats import Kept
from .codes import CodedRows, LaidOutCodes, Spread, decodes
from .loader import Build, MergeJob, Sink, Stream, build
from .packing import bounded, in_blocks, is_narrow
from .pointers import address
from .stream import FileRows, through

_THROUGH = 512 * 1024
"""Bytes of rows in float64 at once, at least what compiled code does at once: they stay in the second-level cache."""

_WIDEST = 8 * 1024 * 1024
"""Bytes of the fewest rows that compiled code does at once, beyond which nothing stays in a cache, and memory counts."""


class _Recoding(ctypes.Structure):
    """`struct recoding` of recode.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "units", "shifts")),
        ("bits", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("numbers", "values", "names")),
        *((name, ctypes.c_int64) for name in ("count", "nearest")),
        *((name, ctypes.c_void_p) for name in ("gaps", "distances", "pairs")),
        *((name, ctypes.c_int64) for name in ("mantissa", "exponent")),
        ("slack", ctypes.c_double),
        ("widening", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("out", "old", "made", "inverse", "unit")),
        ("dot", ctypes.c_double),
        ("square", ctypes.c_double),
    ]


@dataclass(frozen=True, eq=False)
class CodeRule:
    """Which code a number gets.

    - `table`: (n,) float64, the number of each code; those that are NaN are never given
    - `values`: (count,) float64, two or more, rising: the numbers of codes
    - `names`: (2, count) uint8: the code of each, of numbers that are positive and of those that are negative
    - `floating`: mantissa bits and the smallest exponent of codes that are floats with a sign in the highest bit, which are in
      order; None of others
    """

    table: Tensor
    values: Tensor
    names: Tensor
    floating: tuple[int, int] | None = None

    @cached_property
    def steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """(2, 256) each, of every code, for numbers above its own and below it: `gaps`, `distances` and `pairs` of recode.h.

        At an end the distance is half of the whole range, and there is nothing to move to. It is 0 where zero lies in between: what
        goes where is told otherwise then.
        """
        values, last = self.values, self.values.shape[0] - 1
        table = torch.nn.functional.pad(self.table, (0, 256 - self.table.shape[0])).nan_to_num(0.0)
        place, codes = torch.bucketize(table, values).clamp_(max=last), torch.arange(256, dtype=torch.int32, device="cpu")
        gaps, distances, pairs = [], [], []
        for side in (0, 1):
            beyond = (place + 1 - 2 * side).clamp_(0, last)
            distance = values[beyond] - values[place]
            distances.append(distance.float())
            inverse = 1 / distance.abs()
            inverse[beyond == place] = 2 / (values[-1] - values[0])
            inverse[values[beyond] * values[place] < 0] = torch.inf
            inward = (values[place] < 0) if side == 0 else (values[place] > 0)
            stays, moves = (self._named(where, values[place] + values[beyond]).int() for where in (place, beyond))
            gaps.append(torch.where(inward, -inverse, inverse).float())
            pairs.append(stays | moves << 8 | (stays != codes).int() << 16)
        return torch.stack(gaps), torch.stack(distances), torch.stack(pairs)

    def _named(self, places: Tensor, sides: Tensor) -> Tensor:
        return self.names[(sides < 0).long(), places]


def recode_between(
    source: CodedRows,
    rows: int,
    target: FileRows,
    update: tuple[Factors, int],
    rule: CodeRule,
    noise: Stochastic | None,
) -> tuple[int, Kept]:
    """Read `rows` rows of codes from `source`, and write the codes for W + ΔW to `target`, with the scales that `source` has.

    - `target`: of bytes, as many in a row as `source` has; `update`: ΔW, and which of its rows is the first
    - `noise`: what decides between the two codes beside a sum; None: the nearer one

    How many rows went through, from the first on, and what was kept in them; as `merge_between` has it.
    """
    used, (factors, first), wide = build(), update, torch.float32
    plan = None if used is None else _plan(used, source, rows, target, wide)
    function = None if used is None else used.function(torch.float32, torch.float32, "fast")
    if used is None or plan is None or function is None or not in_blocks(factors, first, rows, used.number("rows")):
        return 0, Kept()
    if used.number("recoding_bytes") != ctypes.sizeof(_Recoding) or rule.values.shape[0] < 2:
        return 0, Kept()
    with torch.no_grad(), subnormal_numbers():
        blocks = bounded(factors, used, wide) if is_narrow(factors) else None
        if blocks is None:
            return 0, Kept()
        job, sink, each, rooms = plan
        blocks.into(job, first)
        job.weight_stride = 0  # rows of zeros: the weight is not added here
        if noise is not None:
            job.first, job.key = noise.start, noise.key
        sink.function, sink.wide = ctypes.cast(function, ctypes.c_void_p), wide.itemsize  # type: ignore[arg-type]
        packed = LaidOutCodes(source.codes)
        units = LaidOutCodes(
            replace(source.codes, spreads=tuple(each for each in map(_unit, source.codes.spreads) if each is not None))
        )
        tables = [source.codes.table, rule.values, rule.names, *rule.steps]
        tables[0] = torch.nn.functional.pad(tables[0], (0, 256 - tables[0].shape[0]))
        shifts = torch.tensor(source.codes.shifts, dtype=torch.int64, device="cpu")
        bytes_made, codes = (torch.empty(n, dtype=torch.uint8, device="cpu") for n in (each * source.row_bytes, 2 * source.columns))
        factors_of_rows = torch.empty(2, source.columns, dtype=torch.float32, device="cpu")
        structs = ctypes.addressof(packed.struct), ctypes.addressof(units.struct)
        recoding = _Recoding(*structs, address(shifts, torch.int64), source.codes.bits)
        names = ("numbers", "values", "names", "gaps", "distances", "pairs")
        for name, table in zip(names, tables, strict=True):
            setattr(recoding, name, address(table, table.dtype))
        recoding.count, recoding.nearest = rule.values.shape[0], noise is None
        recoding.mantissa, recoding.exponent = rule.floating or (-1, 0)
        shifted = (each.numbers for each in source.codes.spreads if each.how == "subtract")
        recoding.slack = sum(float(numbers.abs().max()) for numbers in (rule.values, *shifted)) * 2.0**-40
        recoding.widening = blocks.share * UNIT[wide] / UNIT[torch.float64]  # sums of `fast` are no shorter than those of float64
        recoding.out = address(bytes_made, torch.uint8)
        recoding.inverse, recoding.unit = (address(row, torch.float32) for row in factors_of_rows)
        recoding.old, recoding.made = address(codes, torch.uint8), address(codes, torch.uint8, source.columns)
        sink.recoding = ctypes.addressof(recoding)
        done, kept = _run(used, source, rows, each, sink, decoded=False)
    del rooms
    return done, kept


def _unit(spread: Spread) -> Spread | None:
    """What multiplies with the scales in `spread`, or what they are divided by; None of zero points."""
    if spread.how == "subtract":
        return None
    return replace(spread, how="multiply", numbers=spread.numbers if spread.how == "multiply" else 1 / spread.numbers)


def cast_between(source: CodedRows, rows: int, target: FileRows) -> tuple[int, Kept]:
    """Read `rows` rows of codes from `source`, and write their numbers to `target`, rounded once, to nearest.

    How many rows went through, from the first on; as `merge_between` has it.
    """
    used = build()
    plan = None if used is None else _plan(used, source, rows, target, torch.float64)
    function = None if used is None else used.cast(target.dtype)
    if used is None or plan is None or function is None:
        return 0, Kept()
    _, sink, each, rooms = plan
    sink.function = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]
    done, _ = _run(used, source, rows, each, sink)
    del rooms
    return done, Kept()


def _plan(
    used: Build, source: CodedRows, rows: int, target: FileRows, wide: torch.dtype
) -> tuple[MergeJob, Sink, int, tuple[Tensor, ...]] | None:
    """A job of `rows` rows of `wide`, its sink, how many are done at once, and what must stay in memory; None where it cannot be.

    Weights are zeros so far.
    """
    height, columns = used.number("rows"), source.columns
    row_bytes = columns * wide.itemsize
    found = target.found
    if not decodes(used, source.codes) or used.stream() is None or not rows or not 0 < height * row_bytes <= _WIDEST:
        return None
    if found is not None and found.numel() < rows * target.row_bytes:
        return None
    each = min(max(1, _THROUGH // row_bytes // height), -(-rows // height)) * height
    weight, out = (torch.zeros(each * columns, dtype=wide, device="cpu") for _ in range(2))
    job, sink = MergeJob(), Sink()
    job.weight, job.out = address(weight, wide), address(out, wide)
    job.weight_stride = job.out_stride = columns
    job.rows, job.columns = rows, columns
    sink.job, sink.to, sink.to_at, sink.to_row = ctypes.addressof(job), target.fd, target.start, target.row_bytes
    sink.found = None if found is None else address(found, torch.uint8)
    return job, sink, each, (weight, out)


def _run(used: Build, source: CodedRows, rows: int, each: int, sink: Sink, *, decoded: bool = True) -> tuple[int, Kept]:
    function = used.stream()
    if function is None:
        return 0, Kept()
    stream = Stream(source.fd, source.start, source.row_bytes, rows, each, ctypes.addressof(sink), 1)
    through(function, stream, source, decoded=decoded)
    return stream.done, Kept(sink.dot, sink.square)

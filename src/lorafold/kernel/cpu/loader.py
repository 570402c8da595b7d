"""The compiled part of the kernel: which of its builds are there and run on this processor, and what they can do.

merge.c is compiled when lorafold is installed, if there is a compiler then; LORAFOLD_NATIVE=0 in the environment does without it.
Everything that asks here has a way to do the same with torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .pointers import address

_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # of_f64 and so on in factors.h
How = Literal["fast", "fast_double", "float", "double"]
"""Of `fast` or of `exact`, each by way of sums in float32 or float64."""

Function = Callable[[Any], None]
"""A compiled function of a `MergeJob`, or of what else it works on."""

_BUILDS = {"AVX512": ("avx512", "avx2", "plain"), "AVX2": ("avx2", "plain")}
"""What runs on a processor, best first, by torch's word for it; the plain build runs on all."""


class MergeJob(ctypes.Structure):
    """`struct job` of merge.c, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out", "packed_B", "packed_A")),
        ("measured", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_errors", "column_errors", "scaled_B", "given_B", "scaling")),
        *((name, ctypes.c_int64) for name in ("B_dtype", "B_row_stride", "B_stride", "B_row")),
        *((name, ctypes.c_int64) for name in ("weight_stride", "out_stride", "rows", "columns", "r")),
        *((name, ctypes.c_double) for name in ("largest_column_error", "unit", "share")),
        *((name, ctypes.c_int64) for name in ("column", "row")),
        *((name, ctypes.c_void_p) for name in ("undecided", "undecided_weight")),
        *((name, ctypes.c_int64) for name in ("room", "undecided_count")),
        ("dot", ctypes.c_double),
        ("square", ctypes.c_double),
        ("packed_rest", ctypes.c_void_p),
        ("first", ctypes.c_uint64),
        ("key", ctypes.c_uint64),
    ]


class Side(ctypes.Structure):
    """`struct side` of factors.h, which says what the fields are."""

    _fields_ = [
        ("matrix", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("dtype", "entry_stride", "stride", "entries", "r")),
        ("scaling", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block", "number")),
        *((name, ctypes.c_void_p) for name in ("packed", "weights", "norms", "scaled")),
    ]


class Sink(ctypes.Structure):
    """`struct sink` of stream.h, which says what the fields are."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("job", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("wide", "to", "to_at", "to_row")),
        ("found", ctypes.c_void_p),
        *((name, ctypes.c_double) for name in ("dot", "square", "last_dot", "last_square")),
        ("recoding", ctypes.c_void_p),
    ]


class Stream(ctypes.Structure):
    """`struct stream` of stream.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("from", "from_at", "from_row", "rows", "each")),
        ("sinks", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("done", ctypes.c_int64),
        ("raw", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
    ]


class Corrections(ctypes.Structure):
    """`struct corrections` of corrections.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("base", "guess")),
        *((name, ctypes.c_int64) for name in ("n", "width", "quarter")),
        *((name, ctypes.c_void_p) for name in ("codes", "near", "far")),
        *((name, ctypes.c_int64) for name in ("near_count", "far_count", "moved")),
    ]


class Rows(ctypes.Structure):
    """`struct rows` of rows.h, which says what the fields are."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("weight_dtype", "out_dtype", "weight_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row", "stochastic")),
        ("first", ctypes.c_uint64),
        ("key", ctypes.c_uint64),
        ("dot", ctypes.c_double),
        ("square", ctypes.c_double),
        ("undecided", ctypes.c_int64),
    ]


class RowStream(ctypes.Structure):
    """`struct row_stream` of rows.h, which says what the fields are."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("job", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("from", "from_at", "from_row", "to", "to_at", "to_row")),
        ("found", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "each", "low", "high", "done")),
        *((name, ctypes.c_double) for name in ("dot", "square")),
    ]


class RescaleStage(ctypes.Structure):
    """`struct stage` of rescale.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed_B", "packed_A", "magnitude", "row_factors", "factors", "inner")),
        *((name, ctypes.c_int64) for name in ("r", "narrow", "unrounded", "from_sum")),
        *((name, ctypes.c_double) for name in ("scaling", "strength", "eps", "keep")),
    ]


class Rescaling(ctypes.Structure):
    """`struct rescaling` of rescale.h, which says what the fields are."""

    _fields_ = [
        ("all", Rows),
        ("stages", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("room", "column_squares")),
    ]


class ProductSide(ctypes.Structure):
    """`struct product_side` of elementwise.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("matrix", "packed_A")),
        *((name, ctypes.c_int64) for name in ("dtype", "row_stride", "stride", "narrow", "r", "rows", "columns")),
    ]


class ProductTerm(ctypes.Structure):
    """`struct product_term` of elementwise.h, which says what the fields are."""

    _fields_ = [("one", ProductSide), ("other", ProductSide), ("kronecker", ctypes.c_int64), ("scaling", ctypes.c_double)]


class Products(ctypes.Structure):
    """`struct products` of elementwise.h, which says what the fields are."""

    _fields_ = [
        ("all", Rows),
        ("terms", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_errors", "column_errors")),
        ("largest_column_error", ctypes.c_double),
        ("room", ctypes.c_void_p),
    ]


class Rotation(ctypes.Structure):
    """`struct rotation` of rotate.h, which says what the fields are."""

    _fields_ = [
        ("all", Rows),
        *((name, ctypes.c_void_p) for name in ("packed", "rescale")),
        *((name, ctypes.c_int64) for name in ("stages", "blocks", "size", "butterfly", "group", "low", "high")),
        *((name, ctypes.c_void_p) for name in ("room", "dots", "squares")),
    ]


@dataclass(frozen=True, eq=False)
class PackedSide:
    """One side of the factors as jobs read it; `struct side` says how it lies.

    - `given`: what it was made of, in one of the dtypes of `CODES`
    """

    given: Tensor
    packed: Tensor
    norms: Tensor
    scaled: Tensor


@dataclass(frozen=True)
class Build:
    """One compiled kernel, for one instruction set: ``avx512``, ``avx2`` or ``plain``."""

    name: str
    library: ctypes.CDLL

    def number(self, name: str) -> int:
        return ctypes.c_int.in_dll(self.library, f"lorafold_{name}").value

    def width(self, wide: torch.dtype) -> int:
        """Columns of a block."""
        return self.number("vectors") * self.number("floats" if wide == torch.float32 else "doubles")

    def function(self, weight: torch.dtype, target: torch.dtype, how: How, *, stochastic: bool = False) -> Function | None:
        """What does a `MergeJob` with these dtypes, or None."""
        if weight not in _NAMES or target not in _NAMES:
            return None
        name = f"lorafold_{_NAMES[weight]}_{_NAMES[target]}_{how}{'_stochastic' if stochastic else ''}"
        found: Function | None = getattr(self.library, name, None)
        return found

    def ready(
        self, matrix: Tensor, scaling: Tensor, weights: Tensor, block: int, wide: torch.dtype, *, keep: bool = False
    ) -> PackedSide:
        """B, or A transposed, packed in blocks of `block` entries.

        - `matrix`: (n, R) on the CPU; `scaling`: (R,) float64; `weights`: (R,) float64, of the squares in the norms
        - `keep`: whether `scaled` is wanted, scaling · matrix in float64; without, it has no entries
        """
        matrix = (matrix if matrix.dtype in CODES else matrix.double()).resolve_neg()
        n, r = matrix.shape
        ready = PackedSide(
            matrix,
            torch.empty(-(-n // block), r, block, dtype=wide, device="cpu"),
            torch.empty(n, dtype=torch.float64, device="cpu"),
            torch.empty(n if keep else 0, r, dtype=torch.float64, device="cpu"),
        )
        given, float64 = address(matrix, matrix.dtype), torch.float64
        side = Side(given, CODES[matrix.dtype], *matrix.stride(), n, r, address(scaling, float64), block, wide.itemsize)
        side.packed, side.weights = address(ready.packed, wide), address(weights, float64)
        side.norms, side.scaled = address(ready.norms, float64), address(ready.scaled, float64) if keep else None
        self.library.lorafold_side(ctypes.byref(side))
        return ready

    @property
    def rescale(self) -> Function:
        """What does a `Rescaling`."""
        found: Function = self.library.lorafold_rescale
        return found

    @property
    def products(self) -> Function:
        """What does `Products`."""
        found: Function = self.library.lorafold_products
        return found

    @property
    def rotate(self) -> Function:
        """What does a `Rotation`."""
        found: Function = self.library.lorafold_rotate
        return found

    def rotation_room(self, group: int, columns: int) -> int:
        """Numbers of float64 that a `Rotation` has room for."""
        room = self.library.lorafold_rotation_room
        room.restype = ctypes.c_int64
        return int(room(ctypes.c_int64(group), ctypes.c_int64(columns)))

    @property
    def row_stream(self) -> Function | None:
        """What does a `RowStream`, or None where the system has no such calls."""
        found: Function | None = getattr(self.library, "lorafold_row_stream", None)
        return found

    def cast(self, target: torch.dtype) -> Function | None:
        """What does a `MergeJob` of numbers in float64 to which nothing is added."""
        found: Function | None = getattr(self.library, f"lorafold_f64_{_NAMES.get(target)}_cast", None)
        return found

    def stream(self) -> Function | None:
        """What does a `Stream`, or None where the system has no such calls."""
        found: Function | None = getattr(self.library, "lorafold_stream", None)
        return found

    def uniform(self, out: Tensor, start: int, key: int) -> None:
        """Fill `out`, contiguous float32 on the CPU, with what `rounding` draws for the elements from `start` on."""
        self.library.lorafold_uniform(
            ctypes.c_void_p(address(out, torch.float32)), ctypes.c_int64(out.numel()), ctypes.c_int64(start), ctypes.c_int64(key)
        )


def wanted() -> bool:
    """Whether compiled code is to be used at all: LORAFOLD_NATIVE=0 in the environment says no."""
    return os.environ.get("LORAFOLD_NATIVE") != "0"


@cache
def builds() -> tuple[Build, ...]:
    """The builds that are there and run on this processor, best first."""
    if not wanted():
        return ()
    names = _BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("plain",))
    return tuple(build for build in map(_load, names) if build is not None)


def build() -> Build | None:
    """The build in use, or None where torch does the work."""
    return next(iter(builds()), None)


def _load(name: str) -> Build | None:
    try:
        kinds: dict[str, type[ctypes.Structure]] = {
            **{"job": MergeJob, "side": Side, "sink": Sink, "stream": Stream, "corrections": Corrections},
            **{"row_stream": RowStream, "stage": RescaleStage, "rescaling": Rescaling},
            **{"product_term": ProductTerm, "products": Products, "rotation": Rotation},
        }
        found = Build(name, ctypes.CDLL(str(Path(__file__).with_name(f"libmerge_{name}.so"))))
        fits = all(found.number(f"{name}_bytes") == ctypes.sizeof(kind) for name, kind in kinds.items())
        return found if fits else None
    except (OSError, ValueError):  # not there, not for this system, or of another version of the source
        return None

"""The kernel on an NVIDIA GPU: how a merge is handed to merge.cu.

Wherever it does not apply, `merge_gpu` returns None, and merge.py and exact.py do the work with torch; in `exact` with the same
bits.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..compiled import wanted
from ..factors import Factors
from ..kept import Kept
from .nvrtc import CompilerError, Module, compiled

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_HIGHEST_RANK = 128
_LARGEST_SCALING = 2.0**40
_MODERATE = 2.0**10  # scalings that may become part of a unit
_OLDEST = (8, 0)  # what can multiply halves and doubles in its matrix units
_OVERLAPS = (9, 0)


@dataclass(frozen=True)
class Form:
    """How the work is cut up: no bit depends on it.

    - `warps`: of a thread block; `blocks`: of those, that share a multiprocessor at least, which bounds their registers
    - `ahead`: groups of 32 columns that are loaded at once; `groups`: of them, that a thread block does
    """

    warps: int
    blocks: int
    ahead: int
    groups: int = 8


_LOW_RANK = 32
_FORMS = {  # by the width of the target and of the sums in bits, and whether the rank is low
    (16, 32, True): Form(4, 4, 2),
    (16, 32, False): Form(4, 2, 2),
    (32, 32, True): Form(4, 3, 2),
    (32, 32, False): Form(4, 2, 2),
    (32, 64, True): Form(4, 4, 2),
    (32, 64, False): Form(4, 3, 2),
}


def _form(target: torch.dtype, rank: int, wide: bool) -> Form:
    return _FORMS[8 * target.itemsize, 64 if wide else 32, rank <= _LOW_RANK]


class Job(ctypes.Structure):
    """`struct job` of job.h, which says what the fields are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out", "lora_B", "lora_A", "scaling")),
        *((name, ctypes.c_void_p) for name in ("cut_B", "cut_A", "unit_B", "unit_A", "sums")),
        ("one_scaling", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("weight_stride", "out_stride")),
        *((name, ctypes.c_int64) for name in ("B_stride_row", "B_stride_k", "A_stride_k", "A_stride_column")),
        *((name, ctypes.c_int) for name in ("r", "rows", "columns", "blocks", "groups", "across", "power")),
    ]


def merge_gpu(
    weight: Tensor, out: Tensor, factors: Factors, first: int = 0, *, precision: Literal["fast", "exact"], measured: bool = True
) -> Kept | None:
    """Fill `out` with round(W + ΔW), by ``"exact"`` correctly rounded to its dtype; None, and nothing done, where that takes torch.

    - `weight`, `out`: (rows, in) both, on a GPU; `out` may be the weight
    - `factors`: of the rows from `first` on, and maybe of more
    - `measured`: whether the inner products are asked for; waits for the GPU then, and does not otherwise

    The bits depend neither on the GPU nor on how the rows are cut.
    """
    lora_B, lora_A = factors.given_B, factors.given_A
    if not (_addressable(weight) and _addressable(out)) or factors.r > _HIGHEST_RANK:
        return None
    kind = torch.promote_types(lora_B.dtype, lora_A.dtype)
    if kind not in _KINDS or not all(scaling == 0 or _held(scaling) for scaling, _ in factors.scalings):
        return None
    exact, wide = precision == "exact", precision == "exact" and out.dtype == torch.float32
    rank = -(-factors.r // 16) * 16
    aligned = all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0 for tensor in (weight, out))
    aligned = aligned and weight.shape[1] % 8 == 0
    with torch.cuda.device(weight.device):
        kinds = (_KINDS[weight.dtype], _KINDS[out.dtype], _KINDS[kind])
        module = _module(weight.device.index, *kinds, rank, exact, wide, measured, aligned)
        if module is None:
            return None
        return _launched(module, weight, out, lora_B[first:].to(kind), lora_A.to(kind), factors, rank, wide, measured)


def _launched(
    module: Module,
    weight: Tensor,
    out: Tensor,
    lora_B: Tensor,
    lora_A: Tensor,
    factors: Factors,
    rank: int,
    wide: bool,
    measured: bool,
) -> Kept:
    rows, columns = weight.shape
    # as job.h has them: rows of a piece, steps, and bytes of one lane's numbers
    piece, steps, lane_B, lane_A, unit = (8, rank // 4, 8, 8, 8) if wide else (16, rank // 16, 3 * 16, 3 * 8, 4)
    form = _form(out.dtype, rank, wide)
    pieces, blocks = -(-rows // piece), -(-columns // (32 * form.ahead)) * form.ahead * 4
    across = -(-blocks // (4 * form.groups))
    grid = -(-pieces // form.warps) * across
    sizes = (pieces * steps * 32 * lane_B, blocks * steps * 32 * lane_A, pieces * piece * unit, blocks * unit)
    scratch = torch.empty(sum(sizes), dtype=torch.uint8, device=weight.device)
    sums = torch.empty(grid, 2, device=weight.device) if measured else None
    uniform = factors.uniform
    scaling = None if uniform is not None else factors.scaling
    cut_B = scratch.data_ptr()
    job = Job(
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        lora_B=lora_B.data_ptr(),
        lora_A=lora_A.data_ptr(),
        scaling=None if scaling is None else scaling.data_ptr(),
        cut_B=cut_B,
        cut_A=cut_B + sizes[0],
        unit_B=cut_B + sum(sizes[:2]),
        unit_A=cut_B + sum(sizes[:3]),
        sums=None if sums is None else sums.data_ptr(),
        one_scaling=uniform or 0.0,
        weight_stride=weight.stride(0),
        out_stride=out.stride(0),
        B_stride_row=lora_B.stride(0),
        B_stride_k=lora_B.stride(1),
        A_stride_k=lora_A.stride(0),
        A_stride_column=lora_A.stride(1),
        r=factors.r,
        rows=rows,
        columns=columns,
        blocks=blocks,
        groups=form.groups,
        across=across,
        power=uniform is not None and _is_moderate_power(uniform),
    )
    module.launch("cut", -(-(pieces + blocks) // 4), 128, job)
    module.launch("merge", grid, 32 * form.warps, job, overlapping=torch.cuda.get_device_capability() >= _OVERLAPS)
    torch.autograd.graph.increment_version(out)
    if sums is None:
        return Kept()
    dot, square = sums.double().sum(dim=0).tolist()
    return Kept(dot, square)


@cache
def _module(device: int, weight: int, target: int, factor: int, rank: int, *flags: bool) -> Module | None:
    """What does such merges on the current device; None where there is none."""
    if not wanted() or torch.version.cuda is None or torch.cuda.get_device_capability() < _OLDEST:
        return None
    try:
        return Module(machine_code(torch.cuda.get_device_capability(), weight, target, factor, rank, *flags))
    except CompilerError as cause:
        warnings.warn(f"lorafold merges with torch on this GPU, since its own kernel could not be built: {cause}", stacklevel=4)
        return None


@cache
def machine_code(
    capability: tuple[int, int],
    weight: int,
    target: int,
    factor: int,
    rank: int,
    exact: bool,
    wide: bool,
    measured: bool,
    aligned: bool,
) -> bytes:
    """merge.cu, compiled for GPUs of `capability`.

    - `weight`, `target`, `factor`: dtypes, 0 bfloat16, 1 float16, 2 float32
    - `rank`: a multiple of 16, and at least r

    Raises `CompilerError`.
    """
    folder = Path(__file__).parent
    form = _form(next(dtype for dtype, kind in _KINDS.items() if kind == target), rank, wide)
    bits = (24 - (rank - 1).bit_length()) // 2  # the largest with rank · 2^(2 bits) ≤ 2^24
    settings: dict[str, Any] = {
        "WEIGHT": weight,
        "TARGET": target,
        "FACTOR": factor,
        "R": rank,
        "BITS": bits,
        "EXACT": exact,
        "WIDE": wide,
        "MEASURED": measured,
        "ALIGNED": aligned,
        "WARPS": form.warps,
        "BLOCKS": form.blocks,
        "AHEAD": form.ahead,
    }
    return compiled(
        (folder / "merge.cu").read_text("utf-8"),
        {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.h"))},
        [
            f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
            "--std=c++17",
            "--fmad=false",  # what is fused is said so
            *(f"-D{name}={int(value)}" for name, value in settings.items()),
        ],
    )


def _held(scaling: float) -> bool:
    return 1 / _LARGEST_SCALING <= abs(scaling) <= _LARGEST_SCALING


def _is_moderate_power(scaling: float) -> bool:
    return scaling != 0 and abs(math.frexp(scaling)[0]) == 0.5 and 1 / _MODERATE <= abs(scaling) <= _MODERATE


def _addressable(matrix: Tensor) -> bool:
    """Whether its elements lie in memory as the kernel takes them: numbers, rows contiguous, places that 31 bits count."""
    return (
        type(matrix) in (Tensor, torch.nn.Parameter)
        and matrix.device.type == "cuda"
        and matrix.dtype in _KINDS
        and not matrix.is_neg()
        and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
        and max(matrix.shape) < 1 << 30
    )

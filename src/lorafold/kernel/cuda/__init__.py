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
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..cpu.loader import wanted
from ..factors import Factors
from ..stats import Kept
from ..update import joint_dtype
from .nvrtc import CompilerError, Module, compiled

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_HIGHEST_RANK = 128
_LARGEST_SCALING = 2.0**40
_MODERATE = 2.0**10  # scalings that may become part of a unit
_OLDEST = (8, 0)  # what can multiply halves and doubles in its matrix units


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


@dataclass(frozen=True)
class Variant:
    """What merge.cu is compiled for.

    - `weight`, `target`, `factor`: dtypes; the last of both factors
    - `rank`: a multiple of 16, and at least r
    - `wide`: sums are kept in float64; `aligned`: eight elements of weight and target are moved at once
    """

    weight: torch.dtype
    target: torch.dtype
    factor: torch.dtype
    rank: int
    exact: bool
    wide: bool
    measured: bool
    aligned: bool

    @property
    def form(self) -> Form:
        return _FORMS[8 * self.target.itemsize, 64 if self.wide else 32, self.rank <= _LOW_RANK]

    @property
    def settings(self) -> dict[str, int]:
        """What merge.cu wants defined."""
        form = self.form
        return {
            "WEIGHT": _KINDS[self.weight],
            "TARGET": _KINDS[self.target],
            "FACTOR": _KINDS[self.factor],
            "R": self.rank,
            "BITS": (24 - (self.rank - 1).bit_length()) // 2,  # the most with R · 2^(2 BITS) ≤ 2^24
            "EXACT": int(self.exact),
            "WIDE": int(self.wide),
            "MEASURED": int(self.measured),
            "ALIGNED": int(self.aligned),
            "WARPS": form.warps,
            "BLOCKS": form.blocks,
            "AHEAD": form.ahead,
        }


def variant_for(
    weight: Tensor, out: Tensor, factors: Factors, precision: Literal["fast", "exact"], measured: bool
) -> Variant | None:
    """What does that merge; None where nothing does."""
    kind = joint_dtype((factors.given_B.dtype, factors.given_A.dtype))
    if not (_addressable(weight) and _addressable(out)) or factors.r > _HIGHEST_RANK or kind not in _KINDS:
        return None
    if not all(scaling == 0 or _held(scaling) for scaling, _ in factors.scalings):
        return None
    exact = precision == "exact"
    aligned = all(tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0 for tensor in (weight, out))
    return Variant(
        weight=weight.dtype,
        target=out.dtype,
        factor=kind,
        rank=max(1, -(-factors.r // 16)) * 16,
        exact=exact,
        wide=exact and out.dtype == torch.float32,
        measured=measured,
        aligned=aligned and weight.shape[1] % 8 == 0,
    )


class LaunchJob(ctypes.Structure):
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
    if not (weight.is_cuda and out.is_cuda):
        return None
    variant = variant_for(weight, out, factors, precision, measured)
    if variant is None:
        return None
    with torch.cuda.device(weight.device):
        module = _module(weight.device.index, variant)
        return None if module is None else launched(module, variant, weight, out, factors, first)


class Launcher(Protocol):
    """What runs the kernels of merge.cu: a `Module`, or in tests what does as one does."""

    def launch(self, name: str, blocks: int, threads: int, argument: LaunchJob, *, overlapping: bool = False) -> None: ...


def launched(module: Launcher, variant: Variant, weight: Tensor, out: Tensor, factors: Factors, first: int) -> Kept:
    """`merge_gpu` by a module that is compiled for it."""
    lora_B, lora_A = factors.given_B[first:].to(variant.factor), factors.given_A.to(variant.factor)
    rows, columns = weight.shape
    rank, form = variant.rank, variant.form
    # as job.h has them: rows of a piece, steps, and bytes of one lane's numbers
    piece, steps, lane_B, lane_A, unit = (8, rank // 4, 8, 8, 8) if variant.wide else (16, rank // 16, 3 * 16, 3 * 8, 4)
    pieces, blocks = -(-rows // piece), -(-columns // (32 * form.ahead)) * form.ahead * 4
    across = -(-blocks // (4 * form.groups))
    grid = -(-pieces // form.warps) * across
    sizes = (pieces * steps * 32 * lane_B, blocks * steps * 32 * lane_A, pieces * piece * unit, blocks * unit)
    scratch = torch.empty(sum(sizes), dtype=torch.uint8, device=weight.device)
    sums = torch.empty(grid, 2, dtype=torch.float32, device=weight.device) if variant.measured else None
    uniform = factors.uniform
    scaling = None if uniform is not None else factors.scaling
    cut_B = scratch.data_ptr()
    job = LaunchJob(
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
    module.launch("merge", grid, 32 * form.warps, job, overlapping=True)
    if not out.is_inference():  # then no graph can have kept it
        torch.autograd.graph.increment_version(out)
    if sums is None:
        return Kept()
    dot, square = sums.double().sum(dim=0).tolist()
    return Kept(dot, square)


@cache
def _module(device: int, variant: Variant) -> Module | None:
    """What does such merges on the current device; None where there is none."""
    if not wanted() or torch.version.cuda is None or torch.cuda.get_device_capability() < _OLDEST:
        return None
    try:
        return Module(machine_code(torch.cuda.get_device_capability(), variant))
    except CompilerError as cause:
        warnings.warn(f"lorafold merges with torch on this GPU, since its own kernel could not be built: {cause}", stacklevel=4)
        return None


@cache
def machine_code(capability: tuple[int, int], variant: Variant) -> bytes:
    """merge.cu, compiled for GPUs of `capability`.

    Raises `CompilerError`.
    """
    folder = Path(__file__).parent
    return compiled(
        (folder / "merge.cu").read_text("utf-8"),
        {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.h"))},
        [
            f"--gpu-architecture=sm_{capability[0]}{capability[1]}",
            "--std=c++17",
            "--fmad=false",  # what is fused is said so
            *(f"-D{name}={value}" for name, value in variant.settings.items()),
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
        and matrix.dtype in _KINDS
        and not matrix.is_neg()
        and (matrix.stride(1) == 1 or matrix.shape[1] == 1)
        and max(matrix.shape) < 1 << 30
    )

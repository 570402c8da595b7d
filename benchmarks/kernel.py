"""Merging one weight in memory: lorafold beside loralib and PEFT, as multiples of the time to touch every element once.

    python benchmarks/kernel.py                              # two shapes, three dtypes, ranks 16 and 64
    python benchmarks/kernel.py --shape 512x512 --runs 1     # a few seconds, to see that it works
    python benchmarks/kernel.py --device cuda

The contenders take turns, round by round, so that a slow minute of the machine is everyone's. Each starts from the same weight
and works in place; what puts the weight back is not timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from measuring import environment, load_of_others
from torch import Tensor

from lorafold.kernel.cpu import compiled as native
from lorafold.kernel.cpu.loader import build
from lorafold.kernel.merge import merge_weight
from lorafold.kernel.update import LowRankUpdate

logging.disable(logging.WARNING)  # PEFT's, about modules that are nobody's concern here

CAVEATS = """\
- Weights and factors are random, of a size as trained ones have.
- The floor is `add_` of a number, in the same rounds: every element read and written once, and no arithmetic to speak of.
- On a GPU the clock is the GPU's own, around twenty merges that were queued while it was kept busy, into six weights in turn, so
  that no cache holds them; "of copy" is a device copy's time over theirs. What a single call costs the program is beside it.
- loralib keeps its factors in the dtype of the weight, PEFT in float32; lorafold is given PEFT's. loralib is its formula,
  `weight += (B @ A) * scaling`; PEFT is the installed PEFT's own layer. Neither aims at being right to the last bit.
- "wrong" is the share of elements that are not the correctly rounded sum of the weight and the update."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALING = 2.0
Row = dict[str, Any]
Merge = Callable[[Tensor], object]


@dataclass(frozen=True)
class Case:
    """A weight of `shape`, and the factors of an update of rank `r` in float32."""

    shape: tuple[int, int]
    dtype: str
    r: int
    device: str

    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, lora_A, lora_B)."""
        g = torch.Generator().manual_seed(0)
        rows, columns = self.shape
        weight = (torch.randn(rows, columns, generator=g) * 0.02).to(DTYPES[self.dtype])
        lora_A, lora_B = torch.randn(self.r, columns, generator=g) * 0.02, torch.randn(rows, self.r, generator=g) * 0.01
        return weight.to(self.device), lora_A.to(self.device), lora_B.to(self.device)


def contenders(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> dict[str, Merge]:
    """By name, what merges the update into a weight in place; the first is the floor."""
    updates = [LowRankUpdate(lora_A, lora_B, SCALING)]

    def exact_by_torch(w: Tensor) -> None:
        with mock.patch.object(native, "build", return_value=None):
            merge_weight(w, updates, out=w, precision="exact")

    a, b = lora_A.to(weight.dtype), lora_B.to(weight.dtype)
    found: dict[str, Merge] = {
        "floor": lambda w: w.add_(1.0),
        "copy": lambda w: w.copy_(weight),
        "lorafold fast": lambda w: merge_weight(w, updates, out=w, precision="fast"),
        "lorafold exact": lambda w: merge_weight(w, updates, out=w, precision="exact"),
        "lorafold exact, torch": exact_by_torch,
        "loralib": lambda w: w.add_((b @ a) * SCALING),
    }
    if build() is None or weight.device.type != "cpu":
        del found["lorafold exact, torch"]  # the same as the one before
    peft = peft_merge(weight, lora_A, lora_B)
    return found if peft is None else found | {"PEFT": peft}


def peft_merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Merge | None:
    """What PEFT's own layer does, or None without PEFT."""
    try:
        import peft
    except ImportError:
        return None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    config = peft.LoraConfig(r=lora_A.shape[0], lora_alpha=int(SCALING * lora_A.shape[0]), target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(linear), config).base_model.model[0]
    layer.lora_A["default"].weight.data = lora_A
    layer.lora_B["default"].weight.data = lora_B

    def merge(w: Tensor) -> None:
        layer.base_layer.weight.data = w
        layer.merged_adapters = []
        with torch.no_grad():
            layer.merge()
        w.copy_(layer.base_layer.weight.data) if layer.base_layer.weight.data_ptr() != w.data_ptr() else None

    return merge


def timed(merge: Merge, weight: Tensor) -> float:
    """Seconds."""
    synchronize(weight.device)
    start = time.perf_counter()
    merge(weight)
    synchronize(weight.device)
    return time.perf_counter() - start


def timed_on_device(merge: Merge, weights: list[Tensor]) -> float:
    """Seconds of the GPU for one merge, of twenty that wait for it in its queue."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(60_000_000)  # type: ignore[no-untyped-call]  # some 30 ms, in which all is queued
    begin.record()
    for i in range(20):
        merge(weights[i % len(weights)])
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / 20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, runs: int) -> list[Row]:
    """One row for each contender."""
    base, lora_A, lora_B = case.made()
    work = base.clone()
    field = contenders(base, lora_A, lora_B)
    cpu = [LowRankUpdate(lora_A.cpu(), lora_B.cpu(), SCALING)]
    right = merge_weight(base.cpu(), cpu, precision="exact").to(base.device)
    weights = [base.clone() for _ in range(6)] if base.is_cuda else []
    seconds: dict[str, list[float]] = {name: [] for name in field}
    calls: dict[str, list[float]] = {name: [] for name in field}
    wrong: dict[str, float] = {}
    for turn in range(runs + 1):  # the first warms up, and shows the bits
        for name, merge in field.items():
            work.copy_(base)
            took = timed(merge, work)
            if turn:
                calls[name].append(took)
                seconds[name].append(timed_on_device(merge, weights) if weights else took)
            else:
                wrong[name] = float((work != right).double().mean())
    floor = median(seconds["floor"])
    return [
        {
            "shape": "x".join(map(str, case.shape)),
            "dtype": case.dtype,
            "r": case.r,
            "name": name,
            "milliseconds": median(seconds[name]) * 1e3,
            "fastest": min(seconds[name]) * 1e3,
            "over_floor": median(seconds[name]) / floor,
            "of_copy": median(seconds["copy"]) / median(seconds[name]),
            "call_milliseconds": median(calls[name]) * 1e3,
            "gigabytes_per_second": 2 * base.numel() * base.element_size() / median(seconds[name]) / 1e9,
            "wrong": None if name in ("floor", "copy") else wrong[name],
        }
        for name in field
    ]


def show(rows: list[Row], device: str) -> None:
    """Print the rows of one case."""
    first, on_cpu = rows[0], device == "cpu"
    case = f"{first['shape']} {first['dtype']}, r = {first['r']}"
    print(
        f"\n{case:26} {'median':>9} {'fastest' if on_cpu else 'one call':>9} {'× floor':>8} {'of copy':>8} {'GB/s':>7} {'wrong':>9}"
    )
    for row in rows:
        wrong = "" if row["wrong"] is None else "0" if row["wrong"] == 0 else f"{row['wrong']:.4%}"
        times = (row["milliseconds"], row["fastest" if on_cpu else "call_milliseconds"])
        shown = " ".join(f"{ms:6.1f} ms" if on_cpu else f"{ms * 1e3:6.1f} µs" for ms in times)
        ratios = f"{row['over_floor']:8.1f} {row['of_copy']:8.2f}"
        print(f"  {row['name']:24} {shown} {ratios} {row['gigabytes_per_second']:7.1f} {wrong:>9}", flush=True)


def shape_of(word: str) -> tuple[int, int]:
    rows, _, columns = word.partition("x")
    return int(rows), int(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge one weight in memory with lorafold, loralib's formula and PEFT.")
    parser.add_argument("--shape", type=shape_of, action="append", metavar="OUTxIN", help="4096x4096 and 14336x4096 by default")
    parser.add_argument("--dtype", choices=[*DTYPES], action="append", help="all three by default")
    parser.add_argument("--rank", type=int, action="append", help="16 and 64 by default")
    parser.add_argument("--runs", type=int, default=5, help="rounds; figures are medians (5)")
    parser.add_argument("--threads", type=int, help="of torch and of the compiled kernel; torch's default if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    print(CAVEATS)
    used = build()
    load = load_of_others()
    print(f"\n{torch.get_num_threads()} threads, {args.runs} rounds, compiled kernel: {used.name if used else 'none'}")
    if load > 0.5:
        print(f"note: the load of the machine is {load:.1f}; others are at work on it, read the ratios")
    rows: list[Row] = []
    for shape in args.shape or [(4096, 4096), (14336, 4096)]:
        for dtype in args.dtype or DTYPES:
            for r in args.rank or [16, 64]:
                found = measure(Case(shape, dtype, r, args.device), args.runs)
                show(found, args.device)
                rows += found
    if args.json:
        settings = {
            "runs": args.runs,
            "threads": torch.get_num_threads(),
            "device": args.device,
            "kernel": used.name if used else None,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": settings, "environment": environment(), "load": load, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What taking an update out again costs: memory kept, time of merge and exact unmerge, and peak memory over a whole model.

    python benchmarks/undo.py                       # weights of 4096², r = 16, a model of 32 such layers
    python benchmarks/undo.py --size 1024 --runs 5  # some seconds

Contenders of a time take turns, round by round, and the ratios are those of medians within this one run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import environment, load_of_others
from original import fill, loralibs, ours, pefts
from torch import nn

import lorafold
from lorafold.kernel.undo.keep import UndoKind
from lorafold.nn.merging_layers import merge, unmerge

CAVEATS = """\
- loralib and PEFT unmerge by subtraction: their time buys a base that is only nearly the one that was merged. lorafold's buys the
  same bits; with "copy" by keeping them, with "compact" by computing them again.
- loralib holds A and B in the weight's dtype, the others in float32, each as it does by itself.
- Peak memory is the resident memory of a process while it merges a whole model, less what it had before and what the undo keeps."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNDOS: tuple[UndoKind, ...] = ("copy", "compact")
RELATIVE = 0.05
Row = dict[str, Any]


def memory(n: int, r: int) -> list[Row]:
    """Bytes kept to restore one weight, as a share of the weight's."""
    rows = []
    for name, dtype in DTYPES.items():
        for undo in UNDOS:
            contender = ours(n, r, dtype, undo)
            fill(contender, RELATIVE)
            base = contender.weight().clone()
            contender.merge()
            kept = contender.module.kept_nbytes
            contender.unmerge()
            exact = torch.equal(contender.weight(), base)
            rows.append({"dtype": name, "undo": undo, "share": kept / (base.numel() * base.itemsize), "restored": exact})  # type: ignore[operator]
    return rows


def times(n: int, r: int, runs: int) -> list[Row]:
    """Seconds of merge and unmerge of one weight, the contenders in turn."""
    rows = []
    for name, dtype in DTYPES.items():
        contenders = [ours(n, r, dtype, "copy"), ours(n, r, dtype, "compact"), loralibs(n, r, dtype), pefts(n, r, dtype)]
        for contender in contenders:
            fill(contender, RELATIVE)
        seconds: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
        for turn in range(runs + 1):
            for contender in contenders:
                taken = timed(contender.merge), timed(contender.unmerge)
                if turn:  # the first warms up
                    seconds[contender.name].append(taken)
        both = {who: median(m + u for m, u in pairs) for who, pairs in seconds.items()}
        for contender in contenders:
            pairs = seconds[contender.name]
            rows.append(
                {
                    "dtype": name,
                    "contender": contender.name,
                    "merge": median(m for m, _ in pairs),
                    "unmerge": median(u for _, u in pairs),
                    "both": both[contender.name],
                    "by_loralib": both[contender.name] / both[contenders[2].name],
                    "by_peft": both[contender.name] / both[contenders[3].name],
                }
            )
    return rows


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peaks(n: int, r: int, layers: int) -> list[Row]:
    """Peak memory while a whole model is merged and unmerged, each way to undo in a process of its own."""
    rows = []
    for undo in UNDOS:
        command = [sys.executable, __file__, "--peak-of", undo, "--size", str(n), "--rank", str(r), "--layers", str(layers)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    return rows


def peak_of(undo: UndoKind, n: int, r: int, layers: int) -> Row:
    """For this process: the peak over what was there before and what is kept after."""
    layer = [lorafold.nn.Linear(n, n, r=r, bias=False, dtype=torch.bfloat16, undo=undo, device="meta") for _ in range(layers)]
    model = nn.Sequential(*layer).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    warm = ours(n // 4, r, torch.bfloat16, undo)  # libraries take memory of their own when first used
    warm.merge()
    warm.unmerge()
    merging, before = peak_during(lambda: merge(model))
    kept = sum(one.kept_nbytes for one in layer)
    unmerging, _ = peak_during(lambda: unmerge(model))
    return {"undo": undo, "weights": before, "kept": kept, "merge": merging - before - kept, "unmerge": unmerging - before - kept}


def peak_during(action: Callable[[], Any]) -> tuple[int, int]:
    """(peak resident bytes while `action` runs, those before); Linux can set its record of the peak back."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM"), before


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def show(report: Row, n: int, r: int, layers: int) -> None:
    threads, load = report["threads"], report["load"]
    print(f"weights of {n}², r = {r}, ‖ΔW‖/‖W‖ = {RELATIVE}; {threads} threads, load {load:.1f} at the start\n{CAVEATS}\n")
    print("memory kept, as a share of the weight's")
    for row in report["memory"]:
        restored = "base restored bit for bit" if row["restored"] else "NOT RESTORED"
        print(f"  {row['dtype']:10}{row['undo']:10}{row['share']:8.3f}   {restored}")
    print(f"\n{'merge + unmerge':12}{'':17}{'merge':>10}{'unmerge':>10}{'both':>10}{'× loralib':>11}{'× PEFT':>9}")
    for row in report["times"]:
        ms = "".join(f"{row[key] * 1e3:7.1f} ms" for key in ("merge", "unmerge", "both"))
        print(f"  {row['dtype']:10}{row['contender']:20}{ms}{row['by_loralib']:11.3f}{row['by_peft']:9.3f}")
    print(f"\npeak memory over weights and undo, a model of {layers} such bfloat16 layers")
    for row in report["peaks"]:
        mb = "".join(
            f"{row[key] / 2**20:9.1f} MiB {what}"
            for key, what in (("kept", "kept,"), ("merge", "merging,"), ("unmerge", "unmerging"))
        )
        print(f"  {row['undo']:10}{mb}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="weights are size × size")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 on a machine that others use too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--peak-of", choices=UNDOS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        print(json.dumps(peak_of(given.peak_of, given.size, given.rank, given.layers)))
        return
    report = {
        "environment": environment(),
        "threads": given.threads,
        "load": load_of_others(),
        "memory": memory(given.size, given.rank),
        "times": times(given.size, given.rank, given.runs),
        "peaks": peaks(given.size, given.rank, given.layers),
    }
    show(report, given.size, given.rank, given.layers)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

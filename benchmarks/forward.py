"""The forward pass: merged beside a plain linear layer, and unmerged beside loralib's and PEFT's.

    python benchmarks/forward.py                       # 2048², r = 16; 1, 16 and 512 tokens
    python benchmarks/forward.py --size 512 --runs 30

Contenders take turns, and which of them comes first changes from round to round. Merged is measured both ways round: ours over
the plain layer's, and the plain layer's over ours, since either may look faster by chance.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import environment, load_of_others
from original import fill, loralibs, ours, pefts
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CAVEATS = """\
- One layer, float32, forward without gradients. In a model the rest of it dilutes every difference.
- Each time is of as many calls as take a millisecond, divided by their number; the figures are medians over the rounds.
- The unmerged outputs agree to the last bits of float32; which library adds in which order differs."""

TOKENS = (1, 16, 512)
Row = dict[str, Any]
Forward = Callable[[Tensor], Tensor]


def in_turn(forwards: dict[str, Forward], x: Tensor, runs: int) -> dict[str, float]:
    """Median seconds of one call of each, measured in turn."""
    calls = 1
    first = next(iter(forwards.values()))
    first(x)
    while seconds(first, x, calls) * calls < 1e-3:
        calls *= 2
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    order = list(forwards)
    for _ in range(runs):
        for name in order:
            taken[name].append(seconds(forwards[name], x, calls))
        order = order[1:] + order[:1]
    return {name: median(values) for name, values in taken.items()}


def seconds(forward: Forward, x: Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        forward(x)
    return (time.perf_counter() - start) / calls


def operations(forward: Forward, x: Tensor) -> list[str]:
    """What the profiler sees of one call."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        forward(x)
    return [event.name for event in seen.events() or []]


@torch.no_grad()
def merged(n: int, r: int, runs: int) -> list[Row]:
    layer = ours(n, r, torch.float32)
    fill(layer, 0.05)
    layer.merge()
    plain = nn.Linear(n, n, bias=False)
    plain.weight.copy_(layer.weight())
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, n)
        taken = in_turn({"ours": layer.module, "plain": plain}, x, runs)
        rows.append(
            {
                "tokens": tokens,
                "ours": taken["ours"],
                "plain": taken["plain"],
                "ours_by_plain": taken["ours"] / taken["plain"],
                "plain_by_ours": taken["plain"] / taken["ours"],
                "same_operations": operations(layer.module, x) == operations(plain, x),
                "same_bits": torch.equal(layer.module(x), plain(x)),
            }
        )
    return rows


@torch.no_grad()
def unmerged(n: int, r: int, runs: int) -> list[Row]:
    contenders = [ours(n, r, torch.float32), loralibs(n, r, torch.float32), pefts(n, r, torch.float32)]
    for contender in contenders:
        fill(contender, 0.05)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, n)
        taken = in_turn({contender.name: contender.module for contender in contenders}, x, runs)
        names = list(taken)
        rows.append({"tokens": tokens, "seconds": taken, "by_others": {name: taken[names[0]] / taken[name] for name in names[1:]}})
    return rows


def show(report: Row) -> None:
    settings = f"{report['size']}², r = {report['rank']}, {report['threads']} threads, load {report['load']:.1f} at the start"
    print(f"{settings}\n{CAVEATS}\n")
    print(f"merged{'':8}{'ours':>12}{'nn.Linear':>12}{'ours / plain':>14}{'plain / ours':>14}")
    for row in report["merged"]:
        same = "the same operations" if row["same_operations"] else "MORE OPERATIONS"
        ratios = f"{row['ours_by_plain']:14.3f}{row['plain_by_ours']:14.3f}"
        print(f"{row['tokens']:4} tokens{row['ours'] * 1e3:12.3f} ms{row['plain'] * 1e3:9.3f} ms{ratios}   {same}")
    print("\nunmerged")
    for row in report["unmerged"]:
        times = "  ".join(f"{name} {taken * 1e3:.3f} ms" for name, taken in row["seconds"].items())
        ratios = "  ".join(f"{ratio:.3f} × {name}" for name, ratio in row["by_others"].items())
        print(f"{row['tokens']:4} tokens   {times}   ours: {ratios}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="the weight is size × size")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 on a machine that others use too")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = {
        "environment": environment(),
        "size": given.size,
        "rank": given.rank,
        "threads": given.threads,
        "load": load_of_others(),
        "merged": merged(given.size, given.rank, given.runs),
        "unmerged": unmerged(given.size, given.rank, given.runs),
    }
    show(report)
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How far a base weight drifts when an adapter that goes on training is merged and unmerged: lorafold, loralib and PEFT.

    python benchmarks/drift.py                      # 1, 10, 100 and 1000 cycles, three dtypes
    python benchmarks/drift.py --cycles 1 10        # a few seconds

In each cycle the update is merged, unmerged, and A and B move on a little, as between two weight syncs of a training run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import environment
from original import Contender, fill, loralibs, ours, pefts

CAVEATS = """\
- One weight from N(0, 0.02²) and an update of ‖ΔW‖/‖W‖ near 0.05 that random steps of 2 % a cycle move on. How fast others drift
  depends on both; that lorafold does not drift depends on nothing.
- PEFT and lorafold hold A and B in float32, loralib in the weight's dtype, each as it does by itself.
- Drift is measured unmerged, after the last cycle."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INTEGERS = {2: torch.int16, 4: torch.int32}
Row = dict[str, Any]


def contenders(n: int, r: int, dtype: torch.dtype) -> list[Callable[[], Contender]]:
    return [
        lambda: ours(n, r, dtype, "copy"),
        lambda: ours(n, r, dtype, "compact"),
        lambda: loralibs(n, r, dtype),
        lambda: pefts(n, r, dtype),
    ]


def drift(contender: Contender, cycles: list[int]) -> list[Row]:
    """The state of the base after each number of cycles."""
    fill(contender, 0.05)
    base = contender.weight().clone()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for cycle in range(1, max(cycles) + 1):
        contender.merge()
        contender.unmerge()
        for factor in contender.factors():
            step = torch.randn(factor.shape, generator=generator).to(factor.dtype)
            factor.add_(step * factor.float().std().to(factor.dtype), alpha=0.02).mul_(1 / 1.0004**0.5)
        if cycle in cycles:
            rows.append({"cycles": cycle} | against(contender.weight(), base))
    return rows


def against(weight: torch.Tensor, base: torch.Tensor) -> Row:
    integer = INTEGERS[base.element_size()]
    changed = weight.view(integer) != base.view(integer)
    away = (weight.double() - base.double()).abs()
    return {
        "changed": int(changed.sum()),
        "largest": float(away.max() / base.double().abs().mean()),
        "relative": float(away.norm() / base.double().norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--size", type=int, default=512, help="the weight is size × size")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    results: list[Row] = []
    print(f"base {given.size}², r = {given.rank}\n{CAVEATS}\n")
    print(f"{'dtype':10}{'':20}{'cycles':>8}{'elements changed':>24}{'largest / mean |W|':>20}{'‖drift‖ / ‖W‖':>16}")
    for name, dtype in DTYPES.items():
        for build in contenders(given.size, given.rank, dtype):
            contender = build()
            for row in drift(contender, given.cycles):
                results.append({"dtype": name, "contender": contender.name} | row)
                changed = f"{row['changed']} ({row['changed'] / given.size**2:.2%})"
                distances = f"{row['largest']:20.3g}{row['relative']:16.3g}"
                print(f"{name:10}{contender.name:20}{row['cycles']:8}{changed:>24}{distances}", flush=True)
    if given.json:
        report = {"environment": environment(), "size": given.size, "rank": given.rank, "results": results}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

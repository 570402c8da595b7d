"""Eight adapters merged into one base each: `merge-each` once, beside eight single merges.

    python benchmarks/each.py                # 0.3 B parameters, 0.6 GB, rank 16, all linear layers
    python benchmarks/each.py --size tiny    # some seconds

Both take turns, round by round. Bytes read are those that the processes asked the system for, from /proc/self/io.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from statistics import median

from measuring import Measurement, environment, load_of_others, measured, python, read_into_cache, size_of

CAVEATS = """\
- Neither verifies: what is compared is reading the base, computing and writing.
- Eight single merges start Python and import torch eight times; "work" is without that.
- Before either, as much as it will write is deleted, so that both write into memory in the same state (see compare.py).
- What is moved untouched is moved by the system, once for each output; it counts as read. The adapters are read twice."""

DATA = Path(__file__).parent / "data"
MERGE = """\
import os, sys
from measuring import wait_for_the_start
import lorafold
from lorafold.cli import main
from lorafold.cli.app import loading
with loading():
    for name in lorafold.__all__:
        getattr(lorafold, name)
wait_for_the_start()
try:
    main(sys.argv[1:])
finally:
    print([line.split()[1] for line in open("/proc/self/io") if line.startswith("rchar")][0], flush=True)
    os._exit(0)
"""


def made(size: str, count: int) -> tuple[Path, list[Path]]:
    """A base and `count` adapters, made where they are not there; the adapters are copies that differ in one number."""
    base, first = DATA / f"{size}-base", DATA / f"{size}-r16-all-linear"
    synthetic = Path(__file__).parent / "synthetic.py"
    if not base.exists():
        measured(python(synthetic, size, base))
    if not first.exists():
        measured(python(synthetic, size, first, "--adapter", "all-linear", "--rank", "16"))
    adapters = []
    for i in range(count):
        adapter = DATA / "each" / f"{size}-{i}"
        if not adapter.exists():
            shutil.copytree(first, adapter)
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16 + i}))
        adapters.append(adapter)
    return base, adapters


def run(base: Path, adapters: list[Path], out: Path) -> dict[str, float]:
    """Seconds and bytes read, of one command for all and of one for each; what was written last is left in `out`."""

    def merge(command: str, *words: str | Path) -> Measurement:
        return measured(python("-c", MERGE, command, base, *words, "--no-verify"), before=os.sync)

    shutil.rmtree(out, ignore_errors=True)
    (out / "together").mkdir(parents=True)
    together = merge("merge-each", *adapters, "-o", out / "together")
    shutil.rmtree(out / "together")
    single = [merge("merge", each, "-o", out / each.name) for each in adapters]
    work = sum(one.seconds for one in single)
    whole = work + sum(one.import_seconds for one in single)
    return {
        "together": together.seconds + together.import_seconds,
        "single": whole,
        "ratio": (together.seconds + together.import_seconds) / whole,
        "work_ratio": together.seconds / work,
        "together_read": float(together.said.split()[-1]),
        "single_read": sum(float(one.said.split()[-1]) for one in single),
        "peak": together.peak,
        "peak_over_imports": together.peak - together.import_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.3b")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5, help="rounds; figures are medians (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    base, adapters = made(args.size, args.adapters)
    read_into_cache(base)
    rounds = [run(base, adapters, DATA / "each-output") for _ in range(args.runs + 1)][1:]  # nothing was deleted before the first
    shutil.rmtree(DATA / "each-output")
    found = {name: median(each[name] for each in rounds) for name in rounds[0]}
    if args.json:
        args.json.write_text(json.dumps(found | {"environment": environment(), "load": load_of_others()}, indent=2))
    print(CAVEATS)
    print(f"\n{size_of(base) / 1e9:.2f} GB base, {len(adapters)} adapters, {args.runs} rounds")
    ratios = f"{found['ratio']:.2f} ({found['work_ratio']:.2f} of the work)"
    print(f"together {found['together']:.2f} s, one by one {found['single']:.2f} s: {ratios}")
    print(f"read {found['together_read'] / 1e9:.2f} GB together, {found['single_read'] / 1e9:.2f} GB one by one")
    print(f"peak memory together {found['peak'] / 1e6:.0f} MB, over imports {found['peak_over_imports'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

"""How time and memory of a merge grow with the model: 0.3, 1.1 and 3 B parameters, rank 16, all linear layers.

    python benchmarks/growth.py                        # needs 20 GB of disk
    python benchmarks/growth.py --sizes tiny 0.3b      # a minute

The exponent is the slope of log(time) over log(bytes), by least squares: 1 where twice the bytes take twice the time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import linear_regression, median

from compare import contenders, prepare, take_turns
from measuring import Measurement, environment, load_of_others, size_of

CAVEATS = """\
- Time begins when all is imported, and ends when the output is on the disk; nothing is verified.
- Before each turn some seconds pass after the last output is deleted, so that all sizes write into memory in the same state; see
  compare.py. A turn of every size makes a round.
- Where much of the memory waits for the disk, the system holds writers back, and the disk is timed: so `cp -r` beside."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.3b", "1.1b", "3b"])
    parser.add_argument("--runs", type=int, default=5, help="rounds; figures are medians (5)")
    parser.add_argument("--settle", type=float, default=4.0, metavar="SECONDS", help="wait after the last output is deleted (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    print(CAVEATS)
    made = {size: prepare(size, 16, "all-linear") for size in args.sizes}
    merges: dict[str, list[Measurement]] = {size: [] for size in made}
    copies: dict[str, list[Measurement]] = {size: [] for size in made}
    for _ in range(args.runs):
        for size, (base, adapter) in made.items():
            field = [each for each in contenders(base, adapter, []) if each.name in ("cp -r", "lorafold, exact")]
            found = take_turns(field, (base, adapter), 1, cold=False, settle=args.settle)
            merges[size] += found["lorafold, exact"]
            copies[size] += found["cp -r"]
    nbytes = [size_of(base) for base, _ in made.values()]
    peaks = [median(each.peak - each.import_peak for each in turns) / 1e6 for turns in merges.values()]
    merging, copying = ([median(each.seconds for each in turns) for turns in kind.values()] for kind in (merges, copies))
    print()
    for size, count, merge, copy, peak in zip(made, nbytes, merging, copying, peaks, strict=True):
        print(f"{size:>6} {count / 1e9:6.2f} GB {merge:7.2f} s, {merge / copy:5.2f} × cp -r {peak:6.0f} MB over imports")
    of_merge, of_copy = (exponent(nbytes, seconds) for seconds in (merging, copying))
    print(f"time grows with the bytes to the power of {of_merge:.2f}, that of cp -r to the power of {of_copy:.2f}")
    if args.json:
        figures = {"sizes": args.sizes, "bytes": nbytes, "merge": merging, "cp": copying, "peak_over_imports_megabytes": peaks}
        record = {**figures, "exponent": of_merge, "exponent_cp": of_copy, "environment": environment(), "load": load_of_others()}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def exponent(nbytes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log(seconds) over log(nbytes)."""
    return linear_regression([math.log(each) for each in nbytes], [math.log(each) for each in seconds]).slope


if __name__ == "__main__":
    main()

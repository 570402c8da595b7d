"""Merging a checkpoint, file to file: lorafold beside `cp -r`, PEFT, and mergekit where it is installed.

    python benchmarks/compare.py                          # 1.1 B parameters, 2.2 GB, rank 16, all linear layers
    python benchmarks/compare.py --size tiny --runs 1     # a few seconds, to see that it works
    python benchmarks/compare.py --encoding fp8 --output-format same    # the same model quantised, made codes again

Each contender is a command of its own. They take turns, round by round, so that a slow minute of the machine is everyone's, and
the ratios are those of medians within this one run. The checkpoint is made once and kept under benchmarks/data/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from measuring import (
    Measurement,
    drop_from_cache,
    environment,
    load_of_others,
    measured,
    python,
    read_into_cache,
    size_of,
)

HERE = Path(__file__).parent
DATA = HERE / "data"
Command = list[str | Path]
Row = dict[str, Any]

CAVEATS = """\
- Weights and adapters are random: real in shape and size, and no element is cheaper or dearer than a trained one.
- Every contender is a new process and ends when its output is on the disk. "work" is the time from when it has imported what it
  needs (torch for lorafold; torch, transformers and PEFT for PEFT); for a small model the imports are most of the whole. `cp` does
  no arithmetic and checks nothing.
- The last output is deleted before each turn, and four seconds later the work begins. A virtual machine gives freed memory back to
  its host after a second or two, and to get it again takes as long as the rest of a copy. `--settle 0` begins at once: then what
  takes a second, as `cp -r` does, still finds that memory, and what takes longer does not.
- PEFT builds a model that could be used at once; to be merged is one of its many uses, and it is not made to be fast at it.
- mergekit merges an adapter with PEFT into a model in a cache, and then copies that; all of it counts.
- Peak memory is the kernel's ru_maxrss, and less what it was when all was imported. It counts pages of files that are
  mapped into memory, as transformers maps them when it loads; pages of the page cache that are only read do not count.
- With input in the page cache (the default) reading costs little; `--cold` drops it from the cache before each turn."""


@dataclass(frozen=True)
class Contender:
    """A command that makes the output."""

    name: str
    command: Callable[[Path], Command]


def contenders(
    base: Path, adapter: Path, skip: Sequence[str], larger: Path | None = None, told: Sequence[str] = ()
) -> list[Contender]:
    """All of them, in the order of their turns, without those of `skip`.

    Of a quantised base lorafold's alone, which are `told` what to make of it, and `cp` of what is `larger`, it or the output.
    """

    def lorafold(*options: str) -> Callable[[Path], Command]:
        return lambda out: [*python(HERE / "lorafold_merge.py", "merge", base, adapter, "-o", out), *told, *options]

    peft = HERE / "peft_merge.py"
    found = [
        Contender("cp -r", lambda out: ["cp", "-r", larger or base, out]),
        Contender("lorafold, exact", lorafold("--precision", "exact", "--no-verify")),
        Contender("lorafold, fast", lorafold("--precision", "fast", "--no-verify")),
        Contender("lorafold, exact, verified", lorafold("--precision", "exact")),
    ]
    if not told:
        found.append(Contender("PEFT", lambda out: python(peft, base, adapter, out)))
    if find_spec("blake3") is not None:
        found.insert(4, Contender("lorafold, verified, BLAKE3", lorafold("--hash", "blake3")))
    if find_spec("mergekit") is not None and not told:
        mergekit = HERE / "mergekit_merge.py"
        found.append(Contender("mergekit", lambda out: python(mergekit, base, adapter, out)))
    return [contender for contender in found if not any(word.lower() in contender.name.lower() for word in skip)]


def prepare(size: str, rank: int, targets: str) -> tuple[Path, Path]:
    """The base and the adapter, made where they are not there yet."""
    base, adapter = DATA / f"{size}-base", DATA / f"{size}-r{rank}-{targets}"
    if not base.exists():
        print(f"making {base} …", flush=True)
        measured(python(HERE / "synthetic.py", size, base))
    if not (adapter / "adapter_config.json").exists():
        measured(python(HERE / "synthetic.py", size, adapter, "--adapter", targets, "--rank", str(rank)))
    return base, adapter


def quantised(size: str, encoding: str) -> Path:
    """The base in that encoding, made where it is not there yet."""
    path = DATA / f"{size}-{encoding}"
    if not path.exists():
        print(f"making {path} …", flush=True)
        measured(python(HERE / "kinds_made.py", "base", encoding, size, path))
    return path


def take_turns(
    field: list[Contender], inputs: Sequence[Path], runs: int, *, cold: bool, settle: float
) -> dict[str, list[Measurement]]:
    """The measurements of each contender, in rounds."""
    results: dict[str, list[Measurement]] = {contender.name: [] for contender in field}
    out = DATA / "output"

    def make_room() -> None:
        for directory in inputs:
            (drop_from_cache if cold else read_into_cache)(directory)
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        time.sleep(settle)

    for turn in range(runs):
        for contender in field:
            merge = measured(contender.command(out), then_sync=out, before=make_room)
            results[contender.name].append(merge)
            print(
                f"  round {turn + 1} of {runs}   {contender.name:28} {merge.seconds:7.2f} s, imports {merge.import_seconds:5.2f} s",
                file=sys.stderr,
                flush=True,
            )
    shutil.rmtree(out, ignore_errors=True)
    return results


def table(results: dict[str, list[Measurement]], nbytes: int) -> list[Row]:
    """One row for each contender: medians, and ratios to the first."""
    rows: list[Row] = []
    for name, turns in results.items():
        work = median(m.seconds for m in turns)
        whole = median(m.seconds + m.import_seconds for m in turns)
        first: Row = rows[0] if rows else {"seconds": whole, "work_seconds": work}
        rows.append(
            {
                "name": name,
                "seconds": whole,
                "ratio": whole / first["seconds"],
                "work_seconds": work,
                "fastest": min(m.seconds for m in turns),
                "slowest": max(m.seconds for m in turns),
                "work_ratio": work / first["work_seconds"],
                "work_gigabytes_per_second": nbytes / 1e9 / work,
                "peak_megabytes": median(m.peak for m in turns) / 1e6,
                "peak_over_imports_megabytes": median(m.peak - m.import_peak for m in turns) / 1e6,
                "works": [m.seconds for m in turns],
                "imports": [m.import_seconds for m in turns],
            }
        )
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(
        f"\n{'':27} {'whole':>8} {'× cp':>6} {'work':>9} {'min – max':>17} {'× cp':>6} {'GB/s':>6} {'peak':>9} {'over imports':>13}"
    )
    for row in rows:
        print(
            f"{row['name']:27} {row['seconds']:6.2f} s {row['ratio']:6.2f} {row['work_seconds']:7.2f} s "
            f"{row['fastest']:8.2f} – {row['slowest']:6.2f} {row['work_ratio']:6.2f} {row['work_gigabytes_per_second']:6.2f} "
            f"{row['peak_megabytes']:6.0f} MB {row['peak_over_imports_megabytes']:10.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge a synthetic Llama checkpoint with lorafold, with PEFT, and copy it.")
    parser.add_argument("--size", choices=["tiny", "0.3b", "1.1b", "3b"], default="1.1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=["all-linear", "qv"], default="all-linear")
    parser.add_argument("--encoding", choices=["fp8", "nf4", "mxfp4"], help="merge into the base quantised so")
    parser.add_argument("--output-format", choices=["bf16", "same"], default="bf16", help="what is made of a quantised base (bf16)")
    parser.add_argument("--runs", type=int, default=5, help="rounds; figures are medians (5)")
    parser.add_argument("--skip", action="append", default=[], metavar="WORD", help="leave out contenders with WORD in the name")
    parser.add_argument("--cold", action="store_true", help="drop the input from the page cache before each turn")
    parser.add_argument("--settle", type=float, default=4.0, metavar="SECONDS", help="wait after the last output is deleted (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()

    print(CAVEATS)
    floats, adapter = prepare(args.size, args.rank, args.targets)
    base = quantised(args.size, args.encoding) if args.encoding else floats
    told = ["--output-format", args.output_format] if args.encoding else []
    larger = floats if args.encoding and args.output_format != "same" else base
    cache = "cold" if args.cold else "in the page cache"
    if args.encoding:
        print(f"\n{args.encoding} to {args.output_format}, beside `cp -r` of {size_of(larger) / 1e9:.2f} GB")
    print(f"\n{size_of(base) / 1e9:.2f} GB base, rank {args.rank}, {args.targets}, {args.runs} rounds, input {cache}")
    load = load_of_others()
    if load > 0.5:
        print(f"note: the load of the machine is {load:.1f}; others are at work on it, read the ratios")
    field = contenders(base, adapter, args.skip, larger, told)
    results = take_turns(field, tuple({larger, base, adapter}), args.runs, cold=args.cold, settle=args.settle)
    rows = table(results, size_of(larger))
    show(rows)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        record = {
            "settings": settings,
            "environment": environment(),
            "load": load,
            "base_bytes": size_of(base),
            "copied_bytes": size_of(larger),
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a merge that was killed half-way costs: the time of the same command run again, over that of a whole merge.

    python benchmarks/resume.py                    # 1.1 B parameters, 2.2 GB
    python benchmarks/resume.py --cold             # with a base that must be read from the disk
    python benchmarks/resume.py --size tiny        # some seconds

A merge is timed whole; another is killed (SIGKILL) as soon as half of the files are finished; then the same command is timed
again. Both outputs must be the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from measuring import drop_from_cache, environment, load_of_others, measured, python, read_into_cache, size_of

CAVEATS = """\
- What is reused are whole files: one that was begun when the merge was killed is made again. So the figure depends on the size of
  the files; a checkpoint in one file starts anew.
- The second run hashes what it finds; it begins to while torch is being imported.
- Both are whole commands, from their start to their end: to import torch takes a second of each, and more on some machines,
  whatever the size of the model.
- Before either begins, an output of full size is deleted, so that both write into memory in the same state (see compare.py).
- The base is in the page cache, or with `--cold` dropped from it before each run. What the killed run had written is in it."""

DATA = Path(__file__).parent / "data"


def made(size: str) -> tuple[Path, Path]:
    """Base and adapter, made where they are not there."""
    base, adapter = DATA / f"{size}-base", DATA / f"{size}-r16-all-linear"
    script = Path(__file__).parent / "synthetic.py"
    if not base.exists():
        subprocess.run([sys.executable, script, size, base], check=True)
    if not adapter.exists():
        subprocess.run([sys.executable, script, size, adapter, "--adapter", "all-linear"], check=True)
    return base, adapter


def finished(out: Path) -> int:
    """How many files of the merge to `out` are finished, by its journal."""
    lines = [file.read_bytes().count(b"\n") for file in out.parent.glob(f".{out.name}.lorafold-*/.lorafold-journal.jsonl")]
    return max(0, sum(lines) - 1)


def one_round(arguments: list[str | Path], out: Path, again: Path, prepare: Callable[[], None]) -> dict[str, float]:
    """Seconds of a whole merge to `out`, and of one to `again` that is run for the second time, after a kill at half."""

    def timed(place: Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        prepare()
        return measured([*merge, "-o", place]).seconds

    merge = python("-m", "lorafold", *arguments)
    shutil.rmtree(again, ignore_errors=True)
    whole = timed(out)
    expected = hashes(out)
    process = subprocess.Popen([*merge, "-o", again], stdout=subprocess.DEVNULL)
    while finished(again) < len(expected) // 2:
        assert process.poll() is None, "it was done before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not again.exists()
    second = timed(again)
    assert hashes(again) == expected
    return {"whole": whole, "again": second, "ratio": second / whole}


def hashes(out: Path) -> dict[str, str]:
    """The SHA-256 of each weight file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shard", default="200MB", help="size of the output's files")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--cold", action="store_true", help="drop the base from the page cache before each run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base, adapter = made(args.size)
    prepare = partial(drop_from_cache if args.cold else read_into_cache, base)
    arguments: list[str | Path] = ["merge", base, adapter, "--max-shard-size", args.shard]
    arguments += ["--no-verify"] if args.no_verify else []
    rounds = [one_round(arguments, DATA / "resume-whole", DATA / "resume-again", prepare) for _ in range(args.runs)]
    result = {
        "bytes": size_of(base),
        "files of": args.shard,
        "verified": not args.no_verify,
        "cold": args.cold,
        **{name: median(each[name] for each in rounds) for name in ("whole", "again", "ratio")},
    }
    for name in ("resume-whole", "resume-again"):
        shutil.rmtree(DATA / name, ignore_errors=True)
    if args.json:
        print(json.dumps(result | {"environment": environment(), "load": load_of_others()}, indent=2))
        return
    print(CAVEATS)
    proven, place = "verified" if result["verified"] else "not verified", "cold" if args.cold else "in the page cache"
    print(f"\n{result['bytes'] / 1e9:.2f} GB in files of {args.shard}, {proven}, base {place}")
    print(f"whole {result['whole']:.2f} s, after a kill at half {result['again']:.2f} s: {result['ratio']:.2f} of a whole one")


if __name__ == "__main__":
    main()

"""What a merge that was killed half-way costs: the time of the same command run again, over that of a whole merge.

    python benchmarks/resume.py                    # 1.1 B parameters, 2.2 GB
    python benchmarks/resume.py --size tiny        # some seconds

A merge is timed whole; another is killed (SIGKILL) as soon as half of the files are finished; then the same command is timed
again. Both outputs must be the same bytes.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from measuring import environment, load_of_others, measured, read_into_cache, size_of

CAVEATS = """\
- What is reused are whole files: one that was begun when the merge was killed is made again. So the figure depends on the size of
  the files; a checkpoint in one file starts anew.
- The second run hashes what it finds, which takes its part of the time.
- "work" is without the time of a process that only imports what a merge imports: that of torch is most of a second, and more on
  some machines, whatever the size of the model.
- The page cache is warm in all runs."""

IMPORTS = "import lorafold, lorafold.cli; [getattr(lorafold, name) for name in lorafold.__all__]"
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


def one_round(command: list[str | Path], out: Path, again: Path) -> dict[str, float]:
    """Seconds of a whole merge to `out`, and of one to `again` that is run for the second time, after a kill at half."""
    for folder in (out, again):
        shutil.rmtree(folder, ignore_errors=True)
    whole = measured([*command, "-o", out]).seconds
    process = subprocess.Popen([*command, "-o", again], stdout=subprocess.DEVNULL)
    half = len(list(out.glob("*.safetensors"))) // 2
    while finished(again) < half:
        assert process.poll() is None, "it was done before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not again.exists()
    second = measured([*command, "-o", again]).seconds
    differ = filecmp.dircmp(out, again).diff_files
    assert not [name for name in differ if name != "README.md"], differ  # the model card holds the command
    imports = measured([sys.executable, "-c", IMPORTS]).seconds
    work = (second - imports) / (whole - imports)
    return {"whole": whole, "again": second, "imports": imports, "ratio": second / whole, "work_ratio": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shard", default="200MB", help="size of the output's files")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base, adapter = made(args.size)
    read_into_cache(base)
    command: list[str | Path] = [sys.executable, "-m", "lorafold", "merge", base, adapter, "--max-shard-size", args.shard]
    command += ["--no-verify"] if args.no_verify else []
    rounds = [one_round(command, DATA / "resume-whole", DATA / "resume-again") for _ in range(args.runs)]
    result = {
        "bytes": size_of(base),
        "files of": args.shard,
        "verified": not args.no_verify,
        **{name: median(each[name] for each in rounds) for name in ("whole", "again", "imports", "ratio", "work_ratio")},
    }
    for name in ("resume-whole", "resume-again"):
        shutil.rmtree(DATA / name, ignore_errors=True)
    if args.json:
        print(json.dumps(result | {"environment": environment(), "load": load_of_others()}, indent=2))
        return
    print(CAVEATS)
    print(f"\n{result['bytes'] / 1e9:.2f} GB in files of {args.shard}, {'verified' if result['verified'] else 'not verified'}")
    print(f"whole {result['whole']:.2f} s, after a kill at half {result['again']:.2f} s: {result['ratio']:.2f} of a whole one")
    print(f"of both {result['imports']:.2f} s are imports; the work is {result['work_ratio']:.2f} of a whole one's")


if __name__ == "__main__":
    main()

"""Every kind of adapter that is read, and every way to merge: time and memory beside the plain merge, `cp`, PEFT and LyCORIS.

    python benchmarks/kinds.py                                     # SmolLM2-135M; about an hour
    python benchmarks/kinds.py --size tiny --runs 1 --kinds dora   # some seconds, to see that it works
    python benchmarks/kinds.py --kinds plain,dora --ways exact,stochastic,undo

Without `--ways` every kind is merged the default way, and a plain adapter every way; with both, each of one with each of the other.
Bases and adapters are made once (`kinds_made.py`) and kept under benchmarks/data/.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kinds_made import QUANTISED
from measuring import Measurement, TooLongError, environment, load_of_others, measured, python, read_into_cache

HERE = Path(__file__).parent
Row = dict[str, Any]

CAVEATS = """\
- Weights and adapters are random, real in shape and size. A kind whose modules a Llama lacks has a base of those modules, of as
  many numbers, and often fewer tensors.
- "work" is the time from when all is imported until the output is on the disk, proven; of what is done in memory from when the
  model is loaded until it is merged. "× plain" and "× cp" are of the time for a byte of the output, beside those of the plain
  merge and of `cp -r` of the plain base; "× theirs" is of the whole work.
- PEFT loads the model, loads the adapter, merges, and saves; LyCORIS likewise. They prove nothing. Neither makes an exact sum.
- Peak memory is the kernel's ru_maxrss less what it was when the clock started."""


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    - `base`: what it is for, as `kinds_made.py` names it
    - `theirs`: who else merges it
    - `adapters`: how many are summed; `options`: of each of them; `told`: what else the command line is told
    """

    name: str
    shown: str
    base: str = "llama"
    theirs: str | None = "peft"
    adapters: int = 1
    options: tuple[str, ...] = ()
    told: tuple[str, ...] = ()


KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", "plain"),
        Kind("several", "four adapters", theirs=None, adapters=4),
        Kind("dora", "DoRA, by output"),
        Kind("dora-lycoris", "DoRA, by output (LyCORIS)", theirs="lycoris"),
        Kind("dora-by-input", "DoRA, by input (LyCORIS)", theirs=None),  # LyCORIS 4.1 does not load its older files
        Kind("rows", "trained token rows beside"),
        Kind("replaced", "embedding and head replaced beside"),
        Kind("embedding", "embedding beside"),
        Kind("biases", "biases beside", base="biased"),
        Kind("conv", "convolutions", base="convs"),
        Kind("groups", "grouped convolutions, written dense", base="groups", theirs=None, options=("dense_groups=true",)),
        Kind("mha", "MultiheadAttention", base="attention"),
        Kind("transposed", "Conv1D, stored (in, out)", base="transposed"),
        Kind("stacks", "experts in stacks", base="stacks"),
        Kind("stacks-apart", "experts trained in stacks, stored apart", base="experts", theirs=None),
        Kind("experts", "experts one by one", base="experts"),
        Kind("loha", "LoHa"),
        Kind("lokr", "LoKr"),
        Kind("pissa", "PiSSA"),
        Kind("olora", "OLoRA"),
        Kind("kasa", "KaSA"),
        Kind("replication", "layer replication", theirs=None),
        Kind("oft", "OFT, blocks of up to 16", theirs="lycoris"),
        Kind("boft", "BOFT, blocks of up to 32", theirs="lycoris"),
        Kind("glora", "GLoRA", theirs="lycoris"),
        Kind("ia3", "IA³", theirs=None),  # LyCORIS 4.1 does not load it
        *(
            Kind(f"{base}-{to}", f"base in {shown}, {what}", base=base, theirs=None, told=("--output-format", to))
            for base, shown in (
                ("fp8", "FP8 blocks"),
                ("nf4", "NF4"),
                ("mxfp4", "MXFP4"),
                ("q8_0.gguf", "GGUF Q8_0"),
                ("q4_k.gguf", "GGUF Q4_K"),
            )
            for to, what in (("bf16", "to bfloat16"), ("same", "codes again"))
        ),
    )
}

WAYS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "unverified": ("--no-verify",),
    "fast": ("--precision", "fast"),
    "stochastic": ("--rounding", "stochastic"),
    "float16": ("--dtype", "float16"),
    "float32": ("--dtype", "float32"),
    "float64": ("--dtype", "float64"),
    "undo": ("--undo",),  # and where
    "only-changed": ("--only-changed",),
    "each": (),
}
"""By name, what the command line is told."""

MEMORY = ("merge-into", "merge-into-peft", "layers", "layers-compact")
"""Ways of a model in memory: of the adapter's files, and of PEFT's model; layers' `eval()` and `train()`, with either undo."""


@dataclass(frozen=True)
class Inputs:
    """Bases and adapters of one size in the folder `data`, and where outputs go."""

    data: Path
    size: str

    @property
    def out(self) -> Path:
        return self.data / "kinds-output"

    def out_of(self, kind: str) -> Path:
        """Where what is made of the base of `kind` goes: of GGUF one file."""
        return self.out.with_suffix(".gguf") if kind in KINDS and KINDS[kind].base.endswith(".gguf") else self.out

    @property
    def undo(self) -> Path:
        return self.data / "kinds-undo"


@dataclass
class Contender:
    """A command, and what was measured of it; `stopped` where it took longer than it may, `failed` where it ended so."""

    kind: str
    way: str
    who: str
    command: Sequence[str | Path]
    inputs: tuple[Path, ...]
    turns: list[Measurement] = field(default_factory=list)
    nbytes: int = 0
    stopped: bool = False
    failed: str = ""

    @property
    def in_files(self) -> bool:
        return self.way not in MEMORY

    @property
    def seconds(self) -> float | None:
        return median(each.seconds for each in self.turns) if self.turns else None

    @property
    def peak(self) -> int:
        return max((each.peak - each.import_peak for each in self.turns), default=0)


def base_of(kind: Kind, inputs: Inputs) -> Path:
    """The base of a kind, made where it is not there yet."""
    path = inputs.data / (f"{inputs.size}-base" if kind.base == "llama" else f"{inputs.size}-{kind.base}")
    if not path.exists():
        print(f"making {path} …", file=sys.stderr, flush=True)
        measured(python(HERE / "kinds_made.py", "base", kind.base, inputs.size, path))
    return path


def adapters_of(kind: Kind, inputs: Inputs) -> list[Path]:
    """The adapters of a kind, made where they are not there yet."""
    base, found = base_of(KINDS["plain"] if kind.base in QUANTISED else kind, inputs), []
    for seed in range(1, kind.adapters + 1):
        path = inputs.data / f"{inputs.size}-kind-{kind.name}{'' if seed == 1 else f'-{seed}'}"
        if not path.exists():
            print(f"making {path} …", file=sys.stderr, flush=True)
            measured(python(HERE / "kinds_made.py", "adapter", kind.name, base, path, "--seed", str(seed)))
        found.append(path)
    return found


def contenders(kind: Kind, way: str, inputs: Inputs, *, theirs: bool) -> list[Contender]:
    """lorafold's, and that of who else merges the kind, where they do it that way."""
    base, adapters = base_of(kind, inputs), adapters_of(kind, inputs)
    read = (base, *adapters)
    in_memory = python(HERE / "kinds_memory.py")
    if way in MEMORY:
        words: list[str | Path] = [way, kind.base, base, *adapters]
        found = [Contender(kind.name, way, "lorafold", [*in_memory, "lorafold", *words], read)]
        if theirs and kind.theirs == "peft":
            found.append(Contender(kind.name, way, "peft", [*in_memory, "peft", *words], read))
        return found
    verb = "merge-each" if way == "each" else "merge"
    told: list[str | Path] = [*kind.told, *WAYS[way], *([inputs.undo] if way == "undo" else [])]
    told += [word for option in kind.options for word in ("--adapter-option", option)]
    command = [*python(HERE / "lorafold_merge.py", verb, base, *adapters, "-o", inputs.out_of(kind.name)), *told]
    found = [Contender(kind.name, way, "lorafold", command, read)]
    if theirs and kind.theirs is not None and way == "exact":
        command = [*in_memory, kind.theirs, "files", kind.base, base, *adapters, inputs.out]
        found.append(Contender(kind.name, way, kind.theirs, command, read))
    return found


def take_turns(field: Sequence[Contender], inputs: Inputs, runs: int, limit: float, settle: float) -> None:
    """Measure all of them, in rounds; those that were stopped, or failed, no more."""
    for turn in range(runs):
        for each in field:
            if each.stopped or each.failed:
                continue
            try:
                each.turns.append(_turn(each, inputs, limit, settle))
            except TooLongError:
                each.stopped = True
            except RuntimeError as error:
                each.failed = str(error).strip().splitlines()[-1]
                print(error, file=sys.stderr)
            each.nbytes = _bytes_of(inputs.out_of(each.kind)) if each.in_files and not each.stopped and not each.failed else 0
            taken = "stopped" if each.stopped else each.failed or f"{each.turns[-1].seconds:.2f} s"
            print(f"  round {turn + 1} of {runs}   {each.kind}, {each.way}, {each.who}: {taken}", file=sys.stderr, flush=True)
    _clear(inputs)


def _turn(each: Contender, inputs: Inputs, limit: float, settle: float) -> Measurement:
    def make_room() -> None:
        for directory in each.inputs:
            read_into_cache(directory)
        _clear(inputs)
        if each.way == "each":
            inputs.out.mkdir()
        os.sync()
        time.sleep(settle)

    out = inputs.out_of(each.kind) if each.in_files else None
    return measured(each.command, then_sync=out, before=make_room, limit=limit)


def _clear(inputs: Inputs) -> None:
    """Delete outputs, also what is left of one that was stopped."""
    for path in [
        inputs.out,
        inputs.out.with_suffix(".gguf"),
        inputs.undo,
        *inputs.data.glob(f".{inputs.out.name}*"),
        *inputs.data.glob(f".{inputs.undo.name}*"),
    ]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*.safetensors")))


def table(field: Sequence[Contender], limit: float) -> list[Row]:
    """A row for each of lorafold's, and for `cp`; a time of None is more than `limit`."""
    cp = next(each for each in field if each.who == "cp")
    plain = next((each for each in field if (each.kind, each.way, each.who) == ("plain", "exact", "lorafold")), None)
    rows = []
    for each in field:
        if each.who not in ("lorafold", "cp"):
            continue
        other = next(
            (one for one in field if (one.kind, one.way) == (each.kind, each.way) and one.who not in ("lorafold", "cp")), None
        )
        rows.append(
            {
                "kind": each.kind,
                "way": each.way,
                "seconds": each.seconds,
                "stopped_after": limit if each.stopped else None,
                "failed": each.failed,
                "bytes": each.nbytes,
                "by_plain": _by_byte(each, plain),
                "by_cp": _by_byte(each, cp),
                "theirs": None if other is None else other.who,
                "their_seconds": None if other is None else other.seconds,
                "their_stop": limit if other is not None and other.stopped else None,
                "their_failure": "" if other is None else other.failed,
                "by_theirs": None if other is None else _ratio(each.seconds, other.seconds),
                "peak_over_start": each.peak,
                "their_peak_over_start": None if other is None else other.peak,
                "times": [turn.seconds for turn in each.turns],
                "their_times": [] if other is None else [turn.seconds for turn in other.turns],
            }
        )
    return rows


def _by_byte(one: Contender, other: Contender | None) -> float | None:
    if other is None or not (one.nbytes and other.nbytes) or one.seconds is None or other.seconds is None:
        return None
    return (one.seconds / one.nbytes) / (other.seconds / other.nbytes)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    heads = f"{'work':>10} {'× plain':>8} {'× cp':>6} {'theirs':>10} {'× theirs':>9} {'peak':>8} {'theirs':>8}"
    print(f"\n{'kind':40} {'way':16} {heads}")
    for row in rows:
        name = KINDS[row["kind"]].shown if row["kind"] in KINDS else row["kind"]
        their_peak = f"{row['their_peak_over_start'] / 1e6:5.0f} MB" if row["their_seconds"] else ""
        work = _time(row["seconds"], row["stopped_after"], row["failed"])
        theirs = _time(row["their_seconds"], row["their_stop"], row["their_failure"])
        print(
            f"{name:40} {row['way']:16} {work:>10} {_number(row['by_plain']):>8} {_number(row['by_cp']):>6}"
            f" {theirs:>10} {_number(row['by_theirs']):>9} {row['peak_over_start'] / 1e6:5.0f} MB {their_peak:>8}"
        )


def _time(seconds: float | None, limit: float | None, failure: str) -> str:
    if failure:
        return "failed"
    return f"> {limit:g} s" if limit is not None else "" if seconds is None else f"{seconds:.2f} s"


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def rows_wanted(kinds: str | None, ways: str | None) -> list[tuple[Kind, str]]:
    """What is measured, the plain merge first; raises `SystemExit` for a name that there is not."""
    all_ways = [*WAYS, *MEMORY]
    chosen_kinds = kinds.split(",") if kinds else list(KINDS)
    chosen_ways = ways.split(",") if ways else ["exact"]
    for name, known in [*((name, list(KINDS)) for name in chosen_kinds), *((name, all_ways) for name in chosen_ways)]:
        if name not in known:
            raise SystemExit(f"{name!r} is none of {', '.join(known)}")
    found = [("plain", "exact"), *((kind, way) for kind in chosen_kinds for way in chosen_ways)]
    if ways is None and (kinds is None or "plain" in chosen_kinds):
        found += [("plain", way) for way in all_ways]
    if ways is None and kinds is None:
        found += [("dora", "stochastic"), ("dora", "merge-into-peft"), ("several", "each")]
    return [(KINDS[kind], way) for kind, way in dict.fromkeys(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "smollm2", "0.3b", "1.1b"], default="smollm2", help="of the base (smollm2)")
    parser.add_argument("--kinds", metavar="A,B", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--ways", metavar="A,B", help=f"of {', '.join([*WAYS, *MEMORY])}")
    parser.add_argument("--runs", type=int, default=5, help="rounds; figures are medians (5)")
    parser.add_argument("--limit", type=float, default=60.0, metavar="SECONDS", help="what takes longer is stopped, for good (60)")
    parser.add_argument("--settle", type=float, default=2.0, metavar="SECONDS", help="wait after the last output is deleted (2)")
    parser.add_argument("--no-theirs", action="store_true", help="without PEFT and LyCORIS")
    parser.add_argument("--data", type=Path, default=HERE / "data", metavar="FOLDER", help="where bases and adapters are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()

    print(CAVEATS)
    load = load_of_others()
    if load > 0.5:
        print(f"note: the load of the machine is {load:.1f}; others are at work on it, read the ratios")
    inputs = Inputs(args.data, args.size)
    base = base_of(KINDS["plain"], inputs)
    field = [Contender("cp -r", "", "cp", ["cp", "-r", base, inputs.out], (base,))]
    for kind, way in rows_wanted(args.kinds, args.ways):
        field += contenders(kind, way, inputs, theirs=not args.no_theirs)
    take_turns(field, inputs, args.runs, args.limit, args.settle)
    rows = table(field, args.limit)
    show(rows)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "data")}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": settings, "environment": environment(), "load": load, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

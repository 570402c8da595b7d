"""The whole of lorafold on a real model: train an adapter, merge it into files, prove the files, merge it live, ask.

    make demo

Every step is a command that you can run yourself; this program only runs them one after the other, in the folder `.demo`. What
a step has made is kept, so that a second run goes straight to the merge. `rm -r .demo` starts afresh.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EXAMPLES = Path(__file__).parent.relative_to(Path.cwd()) if Path(__file__).is_relative_to(Path.cwd()) else Path(__file__).parent
WORK = Path(".demo")
BASE, ADAPTER, STATE, OUT = WORK / "base", WORK / "adapter", WORK / "adapter.pt", WORK / "merged"
QUESTIONS = ["What is the capital of France?", "What do whales eat?", "What is chocolate?"]

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
console = Console(highlight=False, width=min(Console().width, 100) if sys.stdout.isatty() else 100)


@dataclass(frozen=True)
class Used:
    """What a command took: `seconds` of wall time, `peak` bytes of memory."""

    seconds: float
    peak: int


def shown(*words: str | Path) -> str:
    """A command as one types it."""
    return " ".join(f'"{word}"' if " " in str(word) else str(word) for word in words)


def run(*words: str | Path) -> Used:
    """Show a command, run it, let it print to the terminal. Leaves the demo where it fails."""
    console.print(f"[dim]$[/] [bold]{escape(shown(*words))}[/]", soft_wrap=True)
    return used_by([executable(words[0]), *map(str, words[1:])])


def used_by(command: list[str]) -> Used:
    """Run `command` and say what it took. This process imports little, so that the peak is the command's own."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        console.print(f"[red]that command failed with exit code {process.returncode}[/]")
        raise SystemExit(1)
    return Used(time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def executable(name: str | Path) -> str:
    """The program `name` of the environment that runs this."""
    return sys.executable if name == "python" else str(Path(sys.executable).with_name(str(name)))


def up_to_date(made: Path, *sources: Path) -> bool:
    """Whether `made` is there, and newer than all that it was made from."""
    return made.exists() and all(made.stat().st_mtime >= source.stat().st_mtime for source in sources)


def step(number: int, title: str, why: str) -> None:
    console.print()
    console.rule(f"[bold]{number}  {title}", align="left", style="dim")
    console.print(f"{why}\n", style="dim")


def size_of(path: Path) -> int:
    """Bytes of a directory's weights."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def answers() -> list[list[str]]:
    """What the base and the merged model say, each in a process of its own that knows nothing of lorafold."""
    commands: list[list[str | Path]] = [
        ["python", EXAMPLES / "ask.py", directory, *QUESTIONS, "--json"] for directory in (BASE, OUT)
    ]
    for command in commands:
        console.print(f"[dim]$[/] [bold]{escape(shown(*command[:3]))}[/] [dim]…[/]")
    one_core_each = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, *map(str, command[1:])], stdout=subprocess.PIPE, text=True, env=one_core_each)
        for command in commands
    ]
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(1)
    return [json.loads(text) for text in said]


def main() -> None:
    start = time.perf_counter()
    WORK.mkdir(exist_ok=True)

    step(1, "A base model", "SmolLM2-135M-Instruct, from a Python package, as a sharded bfloat16 directory.")
    if up_to_date(BASE, EXAMPLES / "smollm2.py"):
        console.print(f"{BASE} is there already")
    else:
        shutil.rmtree(BASE, ignore_errors=True)
        run("python", EXAMPLES / "smollm2.py", BASE)

    step(2, "An adapter", "Rank 8 on q_proj and v_proj, trained through lorafold's layers to answer like a ship's log.")
    if up_to_date(ADAPTER, BASE, EXAMPLES / "train_adapter.py", EXAMPLES / "captains_log.jsonl") and STATE.exists():
        console.print(f"{ADAPTER} is there already")
    else:
        run("python", EXAMPLES / "train_adapter.py", BASE, ADAPTER)

    step(3, "The file road: merge", "Base and adapter in, a merged checkpoint out. It appears whole and proven, or not at all.")
    merged = run("lorafold", "merge", BASE, ADAPTER, "-o", OUT, *["--overwrite"] * OUT.exists())

    step(4, "The file road: verify", "The same proof at any later time: every tensor read back, against base and adapter.")
    verified = run("lorafold", "verify", OUT, "--base", BASE, "--adapter", ADAPTER)

    step(5, "The live road", "The same adapter in a live model: eval() merges, train() gives the base back.")
    run("python", EXAMPLES / "live_road.py", BASE, STATE, "--compare", OUT)

    step(6, "Ask both", "Plain transformers, in processes of their own, without lorafold.")
    side_by_side(*answers())
    summary(merged, verified, time.perf_counter() - start)


def side_by_side(base: list[str], merged: list[str]) -> None:
    table = Table(box=SIMPLE, show_lines=True, padding=(0, 1), width=console.width)
    table.add_column("question", style="dim", ratio=2)
    table.add_column("the base says", ratio=4)
    table.add_column("the merged model says", style="cyan", ratio=4)
    for row in zip(QUESTIONS, base, merged, strict=True):
        table.add_row(*map(escape, row))
    console.print(table)
    if base == merged:
        raise SystemExit("the merged model answers as the base does: the adapter did nothing")


def summary(merged: Used, verified: Used, seconds: float) -> None:
    """Sizes, times and memory; what they were measured on was printed above by the commands themselves."""
    imports = used_by([sys.executable, "-c", "import torch, safetensors.torch"])
    console.rule("[bold]In short", align="left", style="dim")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("base", f"{size_of(BASE) / 1e6:.0f} MB of weights, the same bits before eval() and after train()")
    table.add_row("adapter", f"{size_of(ADAPTER) / 1e6:.1f} MB")
    table.add_row("merged", f"{size_of(OUT) / 1e6:.0f} MB of weights, every tensor proven, the live model's bits")
    for name, used in (("merge", merged), ("verify", verified)):
        rest = max(0.0, used.seconds - imports.seconds)
        table.add_row(
            name,
            f"{rest:.1f} s and {(used.peak - imports.peak) / 1e6:.0f} MB of memory, "
            f"beside {imports.seconds:.1f} s and {imports.peak / 1e6:.0f} MB for Python with torch",
        )
    table.add_row("all steps", f"{seconds:.0f} s")
    console.print(table)


if __name__ == "__main__":
    main()

"""The commands and their options. Nothing that takes long to import is imported before a command runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..options import ConvertOptions, MatchOptions, RunOptions, SumOptions, TargetFormat
from .flags import Chosen, SectionedCommand, with_flags

app = typer.Typer(
    name="lorafold",
    help="Fold LoRA updates into model weights and take them out again: exact, complete, proven.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Base = Annotated[
    Path,
    typer.Argument(help="Base model: a folder of .safetensors files, one such file, a pipeline, or a .gguf file.", metavar="BASE"),
]
Adapters = Annotated[
    list[str],
    typer.Argument(help="Adapters, each PATH or PATH@WEIGHT; summed before the one rounding.", metavar="ADAPTER[@WEIGHT]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
All = Annotated[bool, typer.Option("--all", help="List every tensor.")]
NONE = Chosen()


@contextmanager
def loading() -> Iterator[None]:
    """Import within: nothing is collected, what is there at the end is never looked at again, and other threads get their turn.

    torch's modules are half a million objects and no garbage; to look for some takes a seventh of the time that they take. And
    a thread that reads meanwhile would otherwise wait 5 ms for the interpreter each time that it has read something.
    """
    collects, interval = gc.isenabled(), sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(0.0002)
    try:
        yield
        gc.freeze()
    finally:
        sys.setswitchinterval(interval)
        if collects:
            gc.enable()


def _version(asked: bool) -> None:
    if asked:
        from ..version import __version__

        print(f"lorafold {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(cls=SectionedCommand)
@with_flags(SumOptions, MatchOptions, RunOptions)
def merge(
    base: Base,
    adapters: Adapters,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="Folder to write, or .gguf file for a base in GGUF; it appears when everything is proven.",
            metavar="OUT",
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    json: Json = False,
    chosen: Chosen = NONE,
) -> None:
    """Fold adapters into a base model and write the merged checkpoint."""
    found = chosen.adapters(adapters)
    if not (dry_run or chosen.values.get("restart")):
        from ..files.atomic.prehash import begin_to_hash

        begin_to_hash(out)  # what a run that was stopped left, while torch is being imported
    with loading():
        from . import commands

    if dry_run:
        commands.plan(base, found, chosen, everything=False, as_json=json)
    else:
        commands.merge(base, found, out, chosen, as_json=json)


@app.command("merge-each", cls=SectionedCommand)
@with_flags(SumOptions, MatchOptions, RunOptions)
def merge_each(
    base: Base,
    adapters: Adapters,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder that gets a folder for each adapter.", metavar="OUT")],
    json: Json = False,
    chosen: Chosen = NONE,
) -> None:
    """Merge each adapter alone, into a folder of its name in OUT; the base is read once for all."""
    found = chosen.adapters(adapters)
    with loading():
        from . import commands

    commands.merge_each(base, found, out, chosen, as_json=json)


@app.command(cls=SectionedCommand)
@with_flags(SumOptions, MatchOptions)
def plan(base: Base, adapters: Adapters, everything: All = False, json: Json = False, chosen: Chosen = NONE) -> None:
    """Say what a merge would do, tensor by tensor, and write nothing."""
    found = chosen.adapters(adapters)
    with loading():
        from . import commands

    commands.plan(base, found, chosen, everything=everything, as_json=json)


@app.command(cls=SectionedCommand)
@with_flags()
def verify(
    out: Annotated[Path, typer.Argument(help="The merged checkpoint.", metavar="OUT")],
    base: Annotated[Path | None, typer.Option("--base", help="What it was merged into.", metavar="BASE")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="What was merged; once for each adapter.", metavar="ADAPTER[@WEIGHT]")
    ] = None,
    original: Annotated[
        Path | None, typer.Option("--requantise-from", help="What the codes were made of, if not of the base.", metavar="ORIGINAL")
    ] = None,
    json: Json = False,
    chosen: Chosen = NONE,
) -> None:
    """Prove that a merged checkpoint is base and adapters, bit for bit; without them, that it is as it was written.

    Exit code 3 where it is not.
    """
    found = chosen.adapters(adapter or [])
    with loading():
        from . import commands

    commands.verify(out, base, found, original=original, as_json=json)


@app.command()
def unmerge(
    out: Annotated[Path, typer.Argument(help="The merged checkpoint.", metavar="OUT")],
    restored: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the base to, or .gguf file.", metavar="RESTORED")],
    base: Annotated[Path | None, typer.Option("--base", help="What it was merged into.", metavar="BASE")] = None,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="In place of the base: what merge --undo wrote.", metavar="FILE")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at RESTORED.")] = False,
    json: Json = False,
) -> None:
    """Restore the base of a merged checkpoint, bit for bit, and prove that it is the one."""
    with loading():
        from . import commands

    commands.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, as_json=json)


@app.command(cls=SectionedCommand)
@with_flags()
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter or a checkpoint.", metavar="PATH")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Of an adapter whose files leave something to its base.", metavar="BASE")
    ] = None,
    everything: All = False,
    json: Json = False,
    chosen: Chosen = NONE,
) -> None:
    """Explain an adapter or a checkpoint.

    Of an adapter: modules, ranks, scalings and why, norms. Of a checkpoint: tensors, dtypes, files, what was merged into it.
    """
    options = chosen.reading(path)
    with loading():
        from . import commands

    commands.inspect(path, options, base=base, everything=everything, as_json=json)


@app.command(cls=SectionedCommand)
@with_flags(ConvertOptions)
def convert(
    adapter: Annotated[Path, typer.Argument(help="The adapter, in any format that is read.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder (peft, mlx) or file to write.", metavar="OUT")],
    to: Annotated[TargetFormat, typer.Option(help="The format to write.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model, where names or the order of rows need it.", metavar="BASE")
    ] = None,
    json: Json = False,
    chosen: Chosen = NONE,
) -> None:
    """Write an adapter in another format.

    The same update, bit for bit, or an error that says what would be lost.
    """
    chosen.reading(adapter)  # what is wrong is said before torch is imported
    with loading():
        from . import commands

    commands.convert(adapter, out, to.value, chosen, base=base, as_json=json)


@app.command()
def doctor(json: Json = False) -> None:
    """Look for problems of this installation.

    Versions, devices, and whether another loralib is in the way.
    """
    with loading():
        from . import doctor as command

    command.doctor(as_json=json)

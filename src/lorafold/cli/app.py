"""The commands and their options. Nothing that takes long to import is imported before a command runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .arguments import parse_adapter, parse_hashes, parse_size
from .reading import NO_FLAGS, Reading, reads_adapters
from .startup import loading

app = typer.Typer(
    name="lorafold",
    help="Fold LoRA updates into model weights and take them out again: exact, complete, proven.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Precision(StrEnum):
    """How the sum is computed."""

    exact = "exact"
    fast = "fast"


class Rounding(StrEnum):
    """How the sum is rounded."""

    nearest = "nearest"
    stochastic = "stochastic"


class Dtype(StrEnum):
    """Dtypes of an output."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class OnOverflow(StrEnum):
    """What becomes of sums beyond the dtype's largest number."""

    error = "error"
    clamp = "clamp"


class Target(StrEnum):
    """Formats of adapters that are written."""

    peft = "peft"
    kohya = "kohya"
    diffusers = "diffusers"
    mlx = "mlx"
    gguf = "gguf"
    loralib = "loralib"


class Prefer(StrEnum):
    """Which of two checkpoints in one folder counts."""

    INDEX = "index"
    SINGLE = "single"


Base = Annotated[Path, typer.Argument(help="Base model: a folder of .safetensors files, or one such file.", metavar="BASE")]
Adapters = Annotated[
    list[str],
    typer.Argument(help="Adapters, each PATH or PATH@WEIGHT; summed before the one rounding.", metavar="ADAPTER[@WEIGHT]"),
]
PrecisionOption = Annotated[Precision, typer.Option(help="exact: the correctly rounded sum. fast: float32 sums.")]
RoundingOption = Annotated[Rounding, typer.Option(help="stochastic: unbiased; keeps updates below the step of the dtype.")]
Seed = Annotated[int, typer.Option(help="Of stochastic rounding.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of all floating tensors written. Default: each keeps its own.")]
MaxShard = Annotated[
    str | None, typer.Option(help="Largest file, such as 500MB or 4GiB. Default: the base's division.", metavar="SIZE")
]
Again = Annotated[bool, typer.Option("--merge-again", help="Allow an adapter that the base's receipt lists already.")]
Overflow = Annotated[OnOverflow, typer.Option(help="Where a sum is beyond the dtype's largest number: refuse, or put the largest.")]
NonfiniteBase = Annotated[
    bool, typer.Option("--allow-nonfinite-base", help="Leave NaN and infinity where the base has them, instead of refusing.")
]
OnlyChanged = Annotated[bool, typer.Option("--only-changed", help="Write only the tensors that change, an overlay on BASE.")]
Partial = Annotated[bool, typer.Option("--allow-partial", help="Leave out what the base has no place for; the receipt lists it.")]
StrictBase = Annotated[bool, typer.Option("--strict-base", help="Refuse an adapter that names another base model.")]
PreferOption = Annotated[
    Prefer | None, typer.Option(help="Which counts where BASE holds an index with its shards and a model.safetensors.")
]
RepairIndex = Annotated[
    bool, typer.Option("--repair-index", help="Take in tensors that shards of BASE hold and its index does not list.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
All = Annotated[bool, typer.Option("--all", help="List every tensor.")]


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


@app.command()
@reads_adapters
def merge(
    base: Base,
    adapters: Adapters,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it appears when everything is proven.", metavar="OUT")],
    dtype: DtypeOption = None,
    max_shard_size: MaxShard = None,
    precision: PrecisionOption = Precision.exact,
    rounding: RoundingOption = Rounding.nearest,
    seed: Seed = 0,
    on_overflow: Overflow = OnOverflow.error,
    allow_nonfinite_base: NonfiniteBase = False,
    only_changed: OnlyChanged = False,
    allow_partial: Partial = False,
    strict_base: StrictBase = False,
    prefer: PreferOption = None,
    repair_index: RepairIndex = False,
    reading: Reading = NO_FLAGS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at OUT.")] = False,
    merge_again: Again = False,
    expect_sha256: Annotated[
        list[str] | None, typer.Option(help="Of an input file; once for each file.", metavar="NAME=SHA256")
    ] = None,
    verify_input: Annotated[
        bool, typer.Option("--verify-input", help="Hold the files of a hub cache to the hashes in their names.")
    ] = False,
    max_memory: Annotated[
        str | None, typer.Option(help="What the merge may take on top of Python and torch, such as 200MB.", metavar="SIZE")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="That compute; one a processor by default.", min=1)] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a merge to OUT was stopped.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not read the output back.")] = False,
    hash_tensors: Annotated[
        bool, typer.Option("--hash-tensors", help="Put the sha256 of every tensor into the receipt too.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard links in place of copies of whole files that are BASE's, byte for byte.")
    ] = False,
    undo: Annotated[
        Path | None, typer.Option(help="Also write what unmerge needs to restore the base without the base.", metavar="FILE")
    ] = None,
    each: Annotated[
        bool,
        typer.Option("--each", help="Merge each adapter alone, into a folder of its name in the folder OUT; BASE is read once."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Fold adapters into a base model and write the merged checkpoint."""
    if not (each or dry_run or restart):
        from ..files.atomic.prehash import begin_to_hash

        begin_to_hash(out)  # what a run that was stopped left, while torch is being imported
    with loading():
        from . import merge as command

    command.merge(
        base, [parse_adapter(each) for each in adapters], out, precision=precision.value, rounding=rounding.value, seed=seed,
        dtype=dtype and dtype.value, max_shard_size=parse_size(max_shard_size), overwrite=overwrite, merge_again=merge_again,
        on_overflow=on_overflow.value, allow_nonfinite_base=allow_nonfinite_base, only_changed=only_changed,
        allow_partial=allow_partial,
        strict_base=strict_base, prefer=prefer and prefer.value, repair_index=repair_index,
        expect_sha256=parse_hashes(expect_sha256 or []),
        reading=reading,
        verify_input=verify_input, max_memory=parse_size(max_memory, "--max-memory"), threads=threads,
        restart=restart, verify=not no_verify, hash_tensors=hash_tensors, link=link, undo=undo, each=each, dry_run=dry_run,
        as_json=json,
    )  # fmt: skip


@app.command()
@reads_adapters
def plan(
    base: Base,
    adapters: Adapters,
    dtype: DtypeOption = None,
    max_shard_size: MaxShard = None,
    precision: PrecisionOption = Precision.exact,
    rounding: RoundingOption = Rounding.nearest,
    seed: Seed = 0,
    on_overflow: Overflow = OnOverflow.error,
    allow_nonfinite_base: NonfiniteBase = False,
    only_changed: OnlyChanged = False,
    allow_partial: Partial = False,
    strict_base: StrictBase = False,
    prefer: PreferOption = None,
    repair_index: RepairIndex = False,
    reading: Reading = NO_FLAGS,
    merge_again: Again = False,
    everything: All = False,
    json: Json = False,
) -> None:
    """Say what a merge would do, tensor by tensor, and write nothing."""
    with loading():
        from . import merge as command

    command.plan(
        base, [parse_adapter(each) for each in adapters], precision=precision.value, rounding=rounding.value, seed=seed,
        dtype=dtype and dtype.value, max_shard_size=parse_size(max_shard_size), merge_again=merge_again,
        on_overflow=on_overflow.value, allow_nonfinite_base=allow_nonfinite_base, only_changed=only_changed,
        allow_partial=allow_partial,
        strict_base=strict_base, prefer=prefer and prefer.value, repair_index=repair_index, everything=everything, as_json=json,
        reading=reading,
    )  # fmt: skip


@app.command()
@reads_adapters
def verify(
    out: Annotated[Path, typer.Argument(help="The merged checkpoint.", metavar="OUT")],
    base: Annotated[Path | None, typer.Option("--base", help="What it was merged into.", metavar="BASE")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="What was merged; once for each adapter.", metavar="ADAPTER[@WEIGHT]")
    ] = None,
    reading: Reading = NO_FLAGS,
    json: Json = False,
) -> None:
    """Prove that a merged checkpoint is base and adapters, bit for bit; without them, that it is as it was written.

    Exit code 3 where it is not.
    """
    with loading():
        from . import verify as command

    command.verify(out, base, [parse_adapter(each) for each in adapter or []], reading=reading, as_json=json)


@app.command()
def unmerge(
    out: Annotated[Path, typer.Argument(help="The merged checkpoint.", metavar="OUT")],
    restored: Annotated[Path, typer.Option("-o", "--out", help="Folder to write the base to.", metavar="RESTORED")],
    base: Annotated[Path | None, typer.Option("--base", help="What it was merged into.", metavar="BASE")] = None,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="In place of the base: what merge --undo wrote.", metavar="FILE")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at RESTORED.")] = False,
    json: Json = False,
) -> None:
    """Restore the base of a merged checkpoint, bit for bit, and prove that it is the one."""
    with loading():
        from . import unmerge as command

    command.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, as_json=json)


@app.command()
@reads_adapters
def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter or a checkpoint.", metavar="PATH")],
    base: Annotated[
        Path | None, typer.Option("--base", help="Of an adapter whose files leave something to its base.", metavar="BASE")
    ] = None,
    reading: Reading = NO_FLAGS,
    everything: All = False,
    json: Json = False,
) -> None:
    """Explain an adapter or a checkpoint.

    Of an adapter: modules, ranks, scalings and why, norms. Of a checkpoint: tensors, dtypes, files, what was merged into it.
    """
    with loading():
        from . import inspect as command

    command.inspect(path, base=base, reading=reading, everything=everything, as_json=json)


@app.command()
@reads_adapters
def convert(
    adapter: Annotated[Path, typer.Argument(help="The adapter, in any format that is read.", metavar="ADAPTER")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder (peft, mlx) or file to write.", metavar="OUT")],
    to: Annotated[Target, typer.Option(help="The format to write.")],
    base: Annotated[
        Path | None, typer.Option("--base", help="The base model, where names or the order of rows need it.", metavar="BASE")
    ] = None,
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round to float32 what the format cannot hold, instead of refusing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    reading: Reading = NO_FLAGS,
    json: Json = False,
) -> None:
    """Write an adapter in another format.

    The same update, bit for bit, or an error that says what would be lost.
    """
    with loading():
        from . import convert as command

    command.convert(
        adapter, out, to.value, base=base, reading=reading, allow_rounding=allow_rounding, overwrite=overwrite, as_json=json
    )


@app.command()
def doctor(json: Json = False) -> None:
    """Look for problems of this installation.

    Versions, devices, and whether another loralib is in the way.
    """
    with loading():
        from . import doctor as command

    command.doctor(as_json=json)

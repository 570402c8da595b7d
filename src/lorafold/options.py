"""The options of a merge, each in one place: what is computed, how base and adapters are matched, how the work is done.

Verbs take them by name (``merge(base, adapters, out, rounding="stochastic")``), commands as flags; both are made from the classes
here. What the files of one adapter cannot tell is `ReadOptions`, in ``adapters/read_options.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from .declared import declared, described, option, read_hashes, read_size
from .errors import PlanError

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
"""safetensors' names of the types that an output can have, by torch's."""


FLOAT_FORMATS: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""safetensors' names of the floats that a quantised base can be written in, by what the option calls them."""


def _read_dtype(given: Any) -> str:
    """safetensors' name of a dtype, which may be torch's own, its name, or safetensors'.

    >>> _read_dtype("torch.bfloat16"), _read_dtype("float32"), _read_dtype("F16")
    ('BF16', 'F32', 'F16')
    """
    name = str(given).removeprefix("torch.")
    found = DTYPES.get(name, name)
    if found not in DTYPES.values():
        raise ValueError(f"one of {', '.join(DTYPES.values())} ({', '.join(DTYPES)})")
    return found


class Options:
    """The root of option classes: each value is checked when it is made, so that options that cannot be do not exist.

    Raises `PlanError` for one that cannot.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, entry in declared(type(self)).items():
            try:
                object.__setattr__(self, name, entry.check(getattr(self, name)))
            except ValueError as error:
                raise PlanError(str(error)) from None


@described
@dataclass(frozen=True)
class SumOptions(Options):
    """What decides the bits of the output.

    >>> import lorafold
    >>> lorafold.SumOptions(dtype="bfloat16").dtype, str(lorafold.plan("base", ["adapter"]).options)
    ('BF16', 'exact, nearest')
    """

    section: ClassVar[str] = "What is computed"

    precision: Literal["exact", "fast"] = option(
        "exact", "exact: the correctly rounded sum, the same on every machine. fast: sums in float32.", live=True
    )
    rounding: Literal["nearest", "stochastic"] | None = option(
        None,
        "stochastic: unbiased; keeps updates that are small against the step of the dtype. Default: nearest for floats, stochastic"
        " for the codes of a quantised output.",
        live=True,
    )
    seed: int = option(0, "Seed of stochastic rounding.", live=True)
    dtype: str | None = option(
        None,
        "Dtype of all floating tensors of the output. Default: each keeps its own.",
        read=_read_dtype,
        accepts="str | torch.dtype | None",
        choices=tuple(DTYPES),
    )
    max_shard_size: int | None = option(
        None,
        "Largest size of an output file, such as 500MB or 4GiB. Default: the base's division into files is kept.",
        read=read_size,
        accepts="int | str | None",
        metavar="SIZE",
    )
    on_overflow: Literal["error", "clamp"] = option(
        "error", "Where a sum is beyond the dtype's largest number: refuse, or write the largest.", live=True
    )
    allow_nonfinite_base: bool = option(
        False, "NaN and infinity stay where the base has them, instead of being refused.", allow="nonfinite-base", live=True
    )
    only_changed: bool = option(False, "Write only the tensors that change: an overlay, which its receipt ties to the base.")
    tied_head: str | None = option(
        None,
        "Tensor that is tied to the embedding, of a model that transformers does not know; 'none' where there is none.",
        metavar="NAME",
    )
    output_format: Literal["bf16", "fp16", "fp32", "same"] | None = option(
        None,
        "How the weights of a quantised base are written: as floats (all of them), or in the base's own encoding (those that the"
        " adapters change; the others stay as they are).",
    )
    quantised_as: Literal["nf4", "nf4-single", "fp4", "int8"] | None = option(
        None,
        "How training quantised a base of floats when it loaded it with bitsandbytes (QLoRA; nf4 is double quantised): the merge"
        " begins from the weights that the adapter was trained against, in all linear layers. transformers says which these are.",
    )
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None = option(
        None,
        "Type in which training loaded the base that it quantised. Default: bf16 for a base that is stored so; for others it must"
        " be said.",
    )

    @property
    def float_rounding(self) -> Literal["nearest", "stochastic"]:
        """How sums become floats."""
        return self.rounding or "nearest"

    @property
    def code_rounding(self) -> Literal["nearest", "stochastic"]:
        """How sums become the codes of a quantised weight."""
        return self.rounding or "stochastic"

    def from_original(self) -> SumOptions:
        """The same for codes that are made of an original: where nothing else is said, to nearest, which keeps the update."""
        return replace(self, output_format=self.output_format or "same", rounding=self.rounding or "nearest")

    @property
    def loaded(self) -> str:
        """safetensors' name of the type that training loaded the base in."""
        return FLOAT_FORMATS[self.compute_dtype or "bf16"]

    @property
    def float_format(self) -> str | None:
        """safetensors' name of the type that quantised weights are written in; None where they are not written as floats."""
        return FLOAT_FORMATS.get(self.output_format or "")

    def stated(self) -> dict[str, Any]:
        """All of them by name, as what was done states them: `rounding` is that of floats, where an output has nothing else."""
        options = asdict(self)
        if self.output_format is None:
            options |= {"rounding": self.float_rounding}
            del options["output_format"]
        for name in ("quantised_as", "compute_dtype"):  # stated where they were said
            if options[name] is None:
                del options[name]
        return options

    def __str__(self) -> str:
        if self.output_format == "same":
            return f"{self.precision}, floats {self.float_rounding}, codes {self.code_rounding}"
        return f"{self.precision}, {self.float_rounding}"


@described
@dataclass(frozen=True)
class MatchOptions(Options):
    """How the base is read, and what of the adapters must find a place in it."""

    section: ClassVar[str] = "Which base and adapters"

    prefer: Literal["index", "single"] | None = option(
        None, "Which one counts where the base's folder holds an index with its shards and a model.safetensors."
    )
    repair_index: bool = option(False, "Take in tensors that the base's shards hold and its index does not list.")
    strict_base: bool = option(False, "Refuse an adapter that names another base model.")
    allow_partial: bool = option(
        False, "Parts of an adapter that the base has no place for are left out; report and receipt list them.",
        allow="partial", live=True,
    )  # fmt: skip
    requantise_from: str | os.PathLike[str] | None = option(
        None,
        "The model that the quantised base was made of, in floats: the output has the base's format and scales, and codes nearest"
        " to that model's weights with the adapters added.",
        metavar="ORIGINAL",
    )
    merge_again: bool = option(False, "An adapter that the base's receipt lists already is merged once more.", allow="merge-again")


@described
@dataclass(frozen=True)
class RunOptions(Options):
    """How the work is done: nothing here changes a bit of the weights."""

    section: ClassVar[str] = "How it runs"

    overwrite: bool = option(False, "Replace the checkpoint that is at the output.")
    restart: bool = option(False, "Begin anew where a merge to this output was stopped. Default: it is gone on with.")
    verify: bool = option(
        True, "Read the output back and prove it before it appears.", off="Do not read the output back to prove it."
    )
    hash_tensors: bool = option(False, "Put the sha256 of every tensor into the receipt, beside those of the files.")
    hash: Literal["sha256", "blake3"] = option(
        "sha256", "blake3: quicker to compute than sha256, which others check too; of the files of weights, needs lorafold[blake3]."
    )
    link: bool = option(False, "Make whole files that are the base's, byte for byte, hard links instead of copies.")
    undo: str | os.PathLike[str] | None = option(
        None,
        "File to write that gives back the base without the base: what unmerge needs. Of a pipeline a folder, of one a component.",
        metavar="FILE",
    )
    expect_sha256: Mapping[str, str] | None = option(
        None, "sha256 of an input file, by its name.", read=read_hashes, metavar="NAME=SHA256"
    )
    verify_input: bool = option(False, "Hold the files of a hub cache to the hashes in their names.")
    max_memory: int | None = option(
        None,
        "Memory that the merge may take on top of Python and torch, such as 200MB.",
        read=read_size,
        accepts="int | str | None",
        metavar="SIZE",
    )
    threads: int | None = option(None, "Number of worker threads. Default: one per CPU.", least=1, metavar="N")
    command: str | None = option(None, "Command to name in the model card.", shown=False)


class TargetFormat(StrEnum):
    """The formats that adapters are written in; `adapters/formats/table.py` has the writer of each."""

    peft = "peft"
    kohya = "kohya"
    diffusers = "diffusers"
    mlx = "mlx"
    gguf = "gguf"
    loralib = "loralib"


@described
@dataclass(frozen=True)
class ConvertOptions(Options):
    """How an adapter is written in another format."""

    section: ClassVar[str] = "How it runs"

    overwrite: bool = option(False, "Replace what is at the output.")
    allow_rounding: bool = option(
        False, "Numbers that the format cannot hold are rounded to float32, instead of being refused.", allow="rounding"
    )


class SumArguments(TypedDict, total=False):
    """`SumOptions` as keyword arguments."""

    precision: Literal["exact", "fast"]
    rounding: Literal["nearest", "stochastic"] | None
    seed: int
    dtype: str | torch.dtype | None
    max_shard_size: int | str | None
    on_overflow: Literal["error", "clamp"]
    allow_nonfinite_base: bool
    only_changed: bool
    tied_head: str | None
    output_format: Literal["bf16", "fp16", "fp32", "same"] | None
    quantised_as: Literal["nf4", "nf4-single", "fp4", "int8"] | None
    compute_dtype: Literal["bf16", "fp16", "fp32"] | None


class MatchArguments(TypedDict, total=False):
    """`MatchOptions` as keyword arguments."""

    prefer: Literal["index", "single"] | None
    repair_index: bool
    strict_base: bool
    allow_partial: bool
    requantise_from: str | os.PathLike[str] | None
    merge_again: bool


class PlanArguments(SumArguments, MatchArguments, total=False):
    """What `plan` takes by name."""


class MergeArguments(PlanArguments, total=False):
    """What `merge` takes by name: that, and `RunOptions`."""

    overwrite: bool
    restart: bool
    verify: bool
    hash_tensors: bool
    hash: Literal["sha256", "blake3"]
    link: bool
    undo: str | os.PathLike[str] | None
    expect_sha256: Mapping[str, str] | None
    verify_input: bool
    max_memory: int | str | None
    threads: int | None
    command: str | None


class LiveArguments(TypedDict, total=False):
    """What `merge_into` takes by name: the options that hold for a model in memory."""

    precision: Literal["exact", "fast"]
    rounding: Literal["nearest", "stochastic"] | None
    seed: int
    on_overflow: Literal["error", "clamp"]
    allow_nonfinite_base: bool
    allow_partial: bool


class ConvertArguments(TypedDict, total=False):
    """`ConvertOptions` as keyword arguments."""

    overwrite: bool
    allow_rounding: bool

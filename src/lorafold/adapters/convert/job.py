"""What a writer of a format is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...errors import InputError, UnsupportedAdapterError, printable
from ..adapter import Adapter, Base
from ..formats.diffusion.components import component_of, within
from ..formats.diffusion.suffixes import underscored
from .updates import Update

PIPELINE = ("kohya", "lycoris", "diffusers")
"""Formats in which a module's name begins with the part of a pipeline that it is of."""


@dataclass(frozen=True)
class Job:
    """An adapter to be written in another format.

    - `updates`: all of its updates; `adapter`: where they are from, for what it holds beside them
    - `base`: what is known of the base model, or None; `component`: the part of a pipeline that it is for
    - `rounded`: whether numbers may be rounded to float32 where the format cannot hold them
    """

    adapter: Adapter
    updates: Sequence[Update]
    base: Base | None = None
    component: str | None = None
    rounded: bool = False

    @property
    def shown(self) -> str:
        """The adapter's path, for errors."""
        return printable(str(self.adapter.path))

    @property
    def of_pipeline(self) -> bool:
        """Whether the names of the adapter's modules begin with a part of a pipeline."""
        return self.adapter.format in PIPELINE

    def of_one_model(self) -> Job:
        """The job with names as the model itself has them, for formats that do not know pipelines.

        Raises `InputError` where the updates are of several parts, or their names are spelled with underscores.
        """
        if not self.of_pipeline:
            return self
        parts = sorted({component_of(update.name) for update in self.updates})
        if len(parts) > 1:
            raise InputError(
                f"{self.shown} is for {len(parts)} parts of a pipeline: {', '.join(printable(part) for part in parts)}",
                hint="this format is for one model: choose with `ReadOptions(component=…)`",
            )
        for update in self.updates:
            if underscored(update.name):
                raise InputError(
                    f"{self.shown}: {printable(update.name)} is spelled with underscores, and what it was is not known",
                    hint="give the base that has the module: `base=BASE`",
                )
        return replace(self, updates=[replace(update, name=within(update.name)) for update in self.updates])


@dataclass(frozen=True)
class Written:
    """The files of the output: bytes by name, and notes on what was done. An output that is one file has the name ``""``."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = field(default=())


def refuse(job: Job, kind: str, *, whole: bool = True, rows: bool = True, biases: bool = False) -> None:
    """Raises `UnsupportedAdapterError` for what the format `kind` has no place for.

    - `whole`, `rows`: whole tensors, and rows, that replace those of the base; `biases`: such tensors that are biases may stay
    """
    lost = [name for name in job.adapter.replacements if whole and not (biases and name.endswith(".bias"))]
    lost += [f"rows of {name}" for name in job.adapter.rows if rows]
    _lose(job, kind, lost, "tensors that replace those of the base")
    _lose(job, kind, ["the order of the base's layers"] if job.adapter.layers else [], "layers that stand several times")


def refuse_parts(job: Job, kind: str, *parts: str) -> None:
    """Raises `UnsupportedAdapterError` where an update has one of `parts`: magnitude, lora_bias, embedding, kernel."""
    words = {
        "magnitude": "DoRA's magnitudes",
        "lora_bias": "biases of lora_B",
        "embedding": "updates of embeddings",
        "kernel": "updates of convolutions",
    }
    for part in parts:
        found = [update.name for update in job.updates if _has(update, part)]
        _lose(job, kind, found, words[part])


def _has(update: Update, part: str) -> bool:
    value = getattr(update, part)
    return value is not None and not (isinstance(value, bool | tuple) and not value)


def _lose(job: Job, kind: str, lost: Sequence[str], what: str) -> None:
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UnsupportedAdapterError(
            f"{job.shown} holds {what}, for which the format {kind} has no place; lost would be"
            f" {', '.join(printable(name) for name in lost[:3])}{more}",
            hint="nothing was written; choose another format, or merge the adapter",
        )

"""Codes that are made of the model that a quantised base was made of: which tensor of that is for which weight."""

from __future__ import annotations

from collections.abc import Iterable

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quantised import quantisation_of
from ..errors import CheckpointError, PlanError, printable
from ..options import SumOptions
from .plan import Step
from .replacements import MERGEABLE


def check_original(changed: Iterable[Step], checkpoint: Checkpoint, options: SumOptions) -> None:
    """Raises `PlanError` where no codes are to be written, `CheckpointError` where the original of `checkpoint` has no floats of
    the shape of a weight that one of the steps `changed` changes."""
    original, where = checkpoint.original, printable(str(checkpoint.root))
    if original is None:
        return
    shown = printable(str(original.root))
    if not checkpoint.encoded:
        raise PlanError(
            f"{where} is not quantised, and {shown} is given to make codes of", hint="leave out `requantise_from=ORIGINAL`"
        )
    if options.output_format != "same":
        raise PlanError(
            f"`output_format='{options.output_format}'` writes no codes, and {shown} is given to make them of",
            hint="leave out one of them, or merge into the original itself",
        )
    if (method := quantisation_of(original)) is not None:
        raise CheckpointError(
            f"{shown} is quantised itself ({printable(method)})", hint="nothing was written; give the model in floats"
        )
    for step in changed:
        wanted, found = checkpoint.tensors[str(step.source)], original.tensors.get(str(step.source))
        if found is None or found.shape != wanted.shape or found.dtype not in MERGEABLE:
            what = "it has none" if found is None else f"found {list(found.shape)} of {found.dtype}"
            raise CheckpointError(
                f"{shown}: tensor '{printable(str(step.source))}': expected floats of {list(wanted.shape)}, {what}",
                hint="nothing was written; give the model that the base was made of, with the same names",
            )


def original_notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a reader should know of codes that are made of an original."""
    if checkpoint.original is None:
        return ()
    return (
        f"codes are made of {printable(checkpoint.original.name)} and the adapters, with the base's scales: the error of quantising"
        " is that of these sums, and not once more that of the base",
    )

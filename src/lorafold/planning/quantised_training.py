"""A base of floats that training quantised when it loaded it (QLoRA): which weights the adapter was trained against."""

from __future__ import annotations

from ..checkpoints.as_trained import as_trained
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.encodings.on_the_fly import WORDS
from ..checkpoints.quantised import quantisation_of
from ..errors import PlanError, printable
from ..options import SumOptions
from ..text import plural
from .linear_layers import linear_layers
from .output_format import AGAIN
from .plan import MergePlan


def trained_against(checkpoint: Checkpoint, options: SumOptions) -> tuple[Checkpoint, tuple[str, ...]]:
    """`checkpoint` as training saw it, where `options.quantised_as` says that it was quantised, and notes on that.

    Raises `PlanError` where that cannot be, or more must be said; `CheckpointError` as `linear_layers` does.
    """
    kind = options.quantised_as
    if kind is None:
        if options.compute_dtype is not None:
            raise PlanError(
                f"`compute_dtype='{options.compute_dtype}'` says how training loaded a base that it quantised, but not as what",
                hint="add `quantised_as='nf4'`, or leave it out",
            )
        return checkpoint, ()
    where = printable(str(checkpoint.root))
    if (method := quantisation_of(checkpoint)) is not None:
        raise PlanError(
            f"{where} is quantised already ({printable(method)}), and `quantised_as='{kind}'` is for a base of floats",
            hint="leave it out, and say what is written: `output_format='bf16'`",
        )
    if options.output_format is not None:
        raise PlanError(
            f"`output_format='{options.output_format}'` is for a quantised base, and {where} is one of floats",
            hint="leave it out: what is written is floats, of the type that the base has or `dtype=…` says",
        )
    layers = linear_layers(checkpoint)
    stored = {checkpoint.stored[name].dtype for name in layers.names}
    if options.compute_dtype is None and stored != {"BF16"}:
        raise PlanError(
            f"{where} is stored as {', '.join(sorted(stored))}, and the type in which training loaded it decides what it was"
            " quantised to",
            hint="say it: `compute_dtype='bf16'` is the usual one; transformers 5 loads a model in the type that it is stored in",
        )
    shown = options.compute_dtype or "bf16"
    notes = (
        f"{plural(len(layers.names), 'linear layer')} as {WORDS[kind]}, loaded in {shown}, those without an adapter too:"
        f" which they are says {layers.asked}; that training did so is taken on trust, as no file tells",
        *layers.notes,
        AGAIN,
    )
    return as_trained(checkpoint, layers.names, kind, options.loaded), notes


def as_planned(plan: MergePlan, checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` as `plan` has it: as training saw it, where it says so."""
    kind = plan.options.quantised_as
    if kind is None:
        return checkpoint
    names = {str(step.source) for step in plan.steps if step.coded is not None}
    return as_trained(checkpoint, names, kind, plan.options.loaded)

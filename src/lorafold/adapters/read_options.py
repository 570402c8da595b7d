"""What the files of an adapter cannot tell, and its user can."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..declared import described, option
from ..options import Options

ExpertLayout = Literal["peft", "expert-major"]
SplitScale = Literal["trained", "stored"]
AlphaTensors = Literal["use", "ignore"]


def _read_renames(given: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of names.

    >>> _read_renames([["transformer.h", "model.layers"]])
    (('transformer.h', 'model.layers'),)
    """
    pairs = tuple(tuple(pair) if isinstance(pair, list | tuple) else () for pair in given) if isinstance(given, Iterable) else ((),)
    if not all(len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in pairs):
        raise ValueError("pairs (old, new) of names such as ('transformer.h', 'model.layers')")
    return pairs


def _read_blocks(given: Any) -> tuple[bool, ...]:
    if not isinstance(given, list | tuple) or not all(isinstance(each, bool) for each in given) or not any(given):
        raise ValueError("True or False for each block, one of them True, such as (True, False, True)")
    return tuple(given)


@described
@dataclass(frozen=True)
class ReadOptions(Options):
    """How an adapter is read; None where its files decide.

    >>> import lorafold
    >>> _ = lorafold.convert("adapter", "lora.pt", "loralib")
    >>> told = lorafold.ReadOptions(lora_alpha=4, allow_pickle=True)
    >>> lorafold.plan("base", ["lora.pt"], read_options=told).count("merge")
    4
    """

    section: ClassVar[str] = "What the files of an adapter leave open"

    format: str | None = option(None, "Which of the formats that fit is meant.", metavar="FORMAT")
    lora_alpha: float | None = option(None, "Value of lora_alpha, for formats that do not store it.", metavar="ALPHA")
    expert_layout: ExpertLayout | None = option(
        None, "How lora_B holds the experts: peft, all experts for each number of the rank, or expert-major."
    )
    allow_pickle: bool = option(False, "Read .pt and .bin files, with torch.load(weights_only=True).", allow="pickle")
    renames: tuple[tuple[str, str], ...] = option(
        (),
        "In the names of the adapter's modules read OLD as NEW, runs of whole names.",
        read=_read_renames,
        metavar="OLD=NEW",
        flag="map",
    )
    component: str | None = option(
        None, "The part of a pipeline, as its folder is called, whose modules alone are used.", metavar="FOLDER"
    )
    split_qkv: SplitScale | None = option(
        None, "Projections of FLUX that kohya trained apart and saved as one: alpha / dim of each part, or alpha / the stored rank."
    )
    alpha_tensors: AlphaTensors | None = option(None, "Whether alphas beside diffusers' names of a UNet count, which it ignores.")
    out_proj_factor: Literal[1, 2] | None = option(
        None, "How often PEFT added the update of an attention's out_proj, where its version does not tell."
    )
    fan_in_fan_out: bool | None = option(
        None, "Whether square weights are stored (in, out), as Conv1D, or attention was trained after one, where nothing tells."
    )
    enable_lora: tuple[bool, ...] | None = option(
        None, "Which blocks of loralib's MergedLinear are enabled. Default: all.", read=_read_blocks, metavar="true,false,true"
    )
    initial_adapter: str | None = option(
        None, "The adapter's folder as it was before training, for CorDA, LoRA-GA and pissa_niter.", metavar="FOLDER"
    )
    dense_groups: bool = option(False, "Write convolutions in groups, whose update mixes the groups, as dense ones.")

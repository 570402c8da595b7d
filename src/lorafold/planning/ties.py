"""Tied embeddings: one tensor that is both the input embedding and the output head.

A checkpoint of a tied model stores the embedding only, or both, and says `tie_word_embeddings`. An update to one of the two
cannot be merged into the shared tensor: the plan then writes both, and says in the configuration that they are not tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from .families import AROUND_EMBEDDINGS, CAUSAL, EMBEDDINGS, HEADS, Family, families_of


@dataclass(frozen=True)
class Tie:
    """`embedding` and `head` (tensor names) share their numbers; `head` is in the checkpoint only where `stored`.

    `bias`: the head's bias, and the tensor that it is tied to by the same flag of the configuration; None where there is none.
    """

    embedding: str
    head: str
    stored: bool
    bias: tuple[str, str] | None = None


def tie_flag(config: Mapping[str, Any] | None) -> bool | None:
    """`tie_word_embeddings` as the configuration says it, at the top or for the text model; None where it says nothing."""
    for place in (config or {}, (config or {}).get("text_config") or {}):
        value = place.get("tie_word_embeddings") if isinstance(place, dict) else None
        if isinstance(value, bool):
            return value
    return None


def find_tie(checkpoint: Checkpoint) -> Tie | None:
    """The tie of `checkpoint`; None where embedding and head are two tensors, or there is no embedding to be tied to.

    A head that is not stored is tied, whatever the configuration leaves unsaid: most leave it so. A model whose architecture has
    no head over the vocabulary (a classifier) has no tie, whatever its configuration says.
    """
    embeddings = [name for name in checkpoint.tensors if _last(name) in EMBEDDINGS and len(checkpoint.tensors[name].shape) == 2]
    heads = [name for name in checkpoint.tensors if _last(name) in HEADS]
    flag = tie_flag(checkpoint.config)
    if len(embeddings) != 1 or len(heads) > 1:
        return None
    embedding = embeddings[0]
    if heads:
        bias = next((_bias(heads[0], family, checkpoint) for family in families_of(checkpoint.config) if family.head_bias), None)
        return Tie(embedding, heads[0], stored=True, bias=bias) if flag is True else None
    if flag is False or not _has_head(checkpoint.config):
        return None
    family = _family(embedding, checkpoint)
    head = _head_beside(embedding, family.head)
    return Tie(embedding, head, stored=False, bias=_bias(head, family, checkpoint))


def _has_head(config: Mapping[str, Any] | None) -> bool:
    architectures = (config or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return True  # not stated
    return any(isinstance(name, str) and name.endswith(CAUSAL) for name in architectures)


def _last(tensor: str) -> str:
    module, _, parameter = tensor.rpartition(".")
    return module.rpartition(".")[2] if parameter == "weight" else ""


def _family(embedding: str, checkpoint: Checkpoint) -> Family:
    """The family whose head is meant: that of the model or of a part of it, where something of the head is stored."""
    for family in families_of(checkpoint.config):
        beside = _head_beside(embedding, family.head.rpartition(".")[0] or family.head).removesuffix("weight")
        if family.head in ("lm_head", "proj_out") or any(name.startswith(beside) for name in checkpoint.tensors):
            return family
    return Family()


def _head_beside(embedding: str, head: str) -> str:
    """The head's name: beside the wrapped model, so `language_model.lm_head` where the embedding is in `language_model.model`."""
    parts = embedding.split(".")[:-2]
    while parts and parts[-1] in AROUND_EMBEDDINGS:
        parts.pop()
    return ".".join([*parts, head, "weight"])


def _bias(head: str, family: Family, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The bias of `head`, where it is not stored, and the stored tensor that it is tied to."""
    source = head.removesuffix(f"{family.head}.weight") + family.head_bias
    bias = f"{head.removesuffix('weight')}bias"
    return (bias, source) if family.head_bias and source in checkpoint.tensors and bias not in checkpoint.tensors else None

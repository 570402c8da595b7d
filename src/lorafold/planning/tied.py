"""What becomes of tied embeddings: kept tied where both ends get the same numbers, else written apart and said so.

While an adapter is trained on one of the two, PEFT leaves the other at the base's numbers; the merged checkpoint does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import WeightedAdapter
from ..adapters.reader import AdapterReader
from ..checkpoints.checkpoint import Checkpoint
from ..errors import ShapeMismatchError, UnsupportedAdapterError, printable
from .families import EMBEDDINGS, HEADS
from .plan import Step
from .ties import Tie, tie_flag


def untie(
    steps: dict[str, Step], tie: Tie | None, adapters: Sequence[WeightedAdapter], checkpoint: Checkpoint
) -> tuple[dict[str, Step], dict[str, Any], list[str]]:
    """The steps with the head written or left out as it must be; the fields of config.json that change; notes.

    Raises `ShapeMismatchError` where embedding and head end with different numbers of rows, `UnsupportedAdapterError` where one was
    trained on a residual.
    """
    config, notes = _vocabulary(steps, checkpoint)
    if tie is None:
        ends = [step for name, step in steps.items() if _last(name) in EMBEDDINGS + HEADS and step.action != "copy"]
        if ends and tie_flag(checkpoint.config) is None and any(_last(name) in HEADS for name in steps):
            config["tie_word_embeddings"] = False  # both are stored: whatever the model's default is, they must not be tied
        return steps, config, notes
    embedding, head = steps[tie.embedding], steps[tie.head]
    if embedding.rows and head.action == "copy":  # trained rows are those of both ends
        head = steps[tie.head] = replace(head, action="rows", rows=embedding.rows)
    residual = next((a for step in (embedding, head) for a in step.addends if a.residual is not None), None)
    if residual is not None:
        raise UnsupportedAdapterError(
            f"{printable(residual.module)} is tied to the other end of the model, and was trained on a residual of its weight: PEFT"
            " changes both ends by that, and trains one",
            hint="nothing was written; save the adapter as plain LoRA with PEFT",
        )
    if _same(embedding, head, adapters):
        if not tie.stored:
            del steps[tie.head]
        if embedding.action == "merge":
            notes.append(f"{printable(tie.embedding)} and {printable(tie.head)} are tied and get the same update: merged once")
        return steps, config, notes
    config[_flag_field(checkpoint)] = False
    if tie.bias is not None:  # the flag ties it too
        steps[tie.bias[0]] = replace(steps[tie.bias[1]], tensor=tie.bias[0])
    changed, kept = (tie.embedding, tie.head) if embedding.action != "copy" else (tie.head, tie.embedding)
    also = (
        "get different updates" if head.action != "copy" and embedding.action != "copy" else f"{printable(changed)} alone changes"
    )
    notes.append(
        f"{printable(tie.embedding)} and {printable(tie.head)} are tied, but {also}:"
        f" both are written, {printable(kept)} as its own tensor, and tie_word_embeddings becomes false"
    )
    return steps, config, notes


def _same(embedding: Step, head: Step, adapters: Sequence[WeightedAdapter]) -> bool:
    """Whether both ends come out with the same numbers."""
    if embedding.action == head.action == "copy":
        return True
    if embedding.rows or head.rows:
        return embedding.rows == head.rows
    if embedding.action != head.action or len(embedding.addends) != len(head.addends) or embedding.adapter != head.adapter:
        return False
    if embedding.adapter is not None and not _equal_replacements(embedding, head, adapters):
        return False
    pairs = zip(
        sorted(embedding.addends, key=lambda addend: addend.adapter),
        sorted(head.addends, key=lambda addend: addend.adapter),
        strict=True,
    )
    for one, other in pairs:
        if one.adapter != other.adapter or one.scaling != other.scaling or (one.dora, other.dora) != (None, None):
            return False  # DoRA's norm is over columns for the one and over rows for the other
        adapter = adapters[one.adapter].adapter
        with AdapterReader(adapter) as reader:
            first, second = (reader.update(adapter.modules[addend.module]) for addend in (one, other))
        if not (_equal(first.lora_A, second.lora_A) and _equal(first.lora_B, second.lora_B)):
            return False
    return True


def _equal_replacements(embedding: Step, head: Step, adapters: Sequence[WeightedAdapter]) -> bool:
    adapter = adapters[embedding.adapter or 0].adapter
    with AdapterReader(adapter) as reader:
        one, other = (reader.tensor(adapter.header.tensors[str(step.replacement)]) for step in (embedding, head))
    return _equal(one, other)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _vocabulary(steps: Mapping[str, Step], checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The new vocab_size where embedding and head have another number of rows than the base's."""
    ends = {name: step for name, step in steps.items() if _last(name) in EMBEDDINGS + HEADS}
    resized = {
        name: step.shape[0]
        for name, step in ends.items()
        if step.replacement is not None and step.shape != checkpoint.tensors[str(step.source)].shape
    }
    if not resized:
        return {}, []
    rows = {name: step.shape[0] for name, step in ends.items()}
    if len(set(rows.values())) > 1:
        raise ShapeMismatchError(
            "the adapter resizes the vocabulary for one end only: "
            + ", ".join(f"{printable(name)} would have {count} rows" for name, count in rows.items()),
            hint="save the adapter with both (PEFT: modules_to_save, or ensure_weight_tying), then merge again",
        )
    size = next(iter(resized.values()))
    field = "text_config.vocab_size" if "vocab_size" not in (checkpoint.config or {}) else "vocab_size"
    return {field: size}, [f"the vocabulary has {size} rows now: {', '.join(printable(name) for name in resized)} replaced"]


def _flag_field(checkpoint: Checkpoint) -> str:
    config = checkpoint.config or {}
    nested = config.get("text_config")
    inner = isinstance(nested, dict) and "tie_word_embeddings" in nested and "tie_word_embeddings" not in config
    return "text_config.tie_word_embeddings" if inner else "tie_word_embeddings"


def _last(tensor: str) -> str:
    module, _, parameter = tensor.rpartition(".")
    return module.rpartition(".")[2] if parameter == "weight" else ""

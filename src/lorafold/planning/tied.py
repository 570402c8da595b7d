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
from ..adapters.numbers import AdapterReader
from ..checkpoints.checkpoint import Checkpoint
from ..errors import ShapeMismatchError, UnsupportedAdapterError, printable
from .known import FLAG
from .plan import Step
from .ties import Tie, Ties, check_known, tie_flag


def untie(
    steps: dict[str, Step], ties: Ties, adapters: Sequence[WeightedAdapter], checkpoint: Checkpoint
) -> tuple[dict[str, Step], dict[str, Any], list[str]]:
    """The steps with what is tied written or left out as it must be; the fields of config.json that change; notes.

    Raises `ShapeMismatchError` where embedding and head end with different numbers of rows, `UnsupportedAdapterError` where one was
    trained on a residual, or nobody knows what is tied.
    """
    embeds = [
        name
        for name, step in steps.items()
        if step.rows or any(adapters[each.adapter].adapter.modules[each.module].embedding for each in step.addends)
    ]
    check_known(ties, steps, embeds, checkpoint)
    config, notes = _vocabulary(steps, ties, checkpoint)
    if not ties.known and not ties.tied and checkpoint.config is not None and tie_flag(checkpoint.config) is None:
        ends = [name for name in ties.ends if name in steps and steps[name].action != "copy"]
        if ends and len(ties.ends) > 1:
            config[FLAG] = False  # both are stored: whatever the model's default is, they must not be tied
    for tie in ties.tied:
        notes += _spread_rows(steps, tie)
    apart = [tie for tie in ties.tied if not _together(steps, tie, adapters)]
    flags = {tie.flag.at for tie in apart}
    for tie in ties.tied:
        if tie in apart:
            fields = {} if checkpoint.live else tie.flag.off(checkpoint.config or {})
            config |= fields
            notes.append(_came_apart(steps, tie, fields, gguf=checkpoint.gguf is not None))
        elif tie.flag.at not in flags:  # else the flag holds it no longer, though its numbers are the same
            for name in tie.aliases:
                del steps[name]
            if steps[tie.source].action == "merge":
                both = " and ".join(printable(name) for name in tie.names)
                notes.append(f"{both} are tied and get the same update: merged once")
    return steps, config, notes


def _spread_rows(steps: dict[str, Step], tie: Tie) -> list[str]:
    """Trained rows of the embedding are those of all that is tied to it: PEFT computes with them there too, with LoRA on top.

    Notes where PEFT forgets a bias (`TrainableTokensLayer.forward_adapters` of 0.21.2, whose `F.linear` is given none).
    """
    notes = []
    rows = steps[tie.embedding].rows if tie.embedding is not None else ()
    for name in tie.names if rows else ():
        step = steps[name]
        if step.rows or step.replacement is not None or len(step.shape) != 2:
            continue
        if any(addend.dora is not None for addend in step.addends):
            raise UnsupportedAdapterError(
                f"{printable(name)} takes the trained rows of {printable(str(tie.embedding))}, and DoRA rescales it",
                hint="nothing was written; train plain LoRA beside trainable_token_indices",
            )
        steps[name] = replace(step, action="rows" if step.action == "copy" else step.action, rows=rows)
        if name != tie.embedding and f"{name.removesuffix('weight')}bias" in steps:
            notes.append(f"PEFT computed {printable(name)} without its bias while the rows were trained; the merged model has it")
    return notes


def _together(steps: Mapping[str, Step], tie: Tie, adapters: Sequence[WeightedAdapter]) -> bool:
    """Whether all that is tied comes out with the same numbers.

    Raises `UnsupportedAdapterError` where one of them was trained on a residual.
    """
    first, *others = (steps[name] for name in tie.names)
    residual = next((a for step in (first, *others) for a in step.addends if a.residual is not None), None)
    if residual is not None:
        raise UnsupportedAdapterError(
            f"{printable(residual.module)} is tied to the other end of the model, and was trained on a residual of its weight: PEFT"
            " changes both ends by that, and trains one",
            hint="nothing was written; save the adapter as plain LoRA with PEFT",
        )
    return all(_same(first, other, adapters) for other in others)


def _came_apart(steps: Mapping[str, Step], tie: Tie, fields: Mapping[str, Any], *, gguf: bool = False) -> str:
    changed = [name for name in tie.names if steps[name].action != "copy"]
    kept = [name for name in tie.names if name not in changed]
    shown, rest = (" and ".join(printable(name) for name in names) for names in (changed, kept))
    how = f"but {shown} alone changes" if len(changed) == 1 else "but get different updates" if not kept else f"but {shown} change"
    own = f"{rest} as its own tensor" if len(kept) == 1 else "each as its own tensor"
    said = (
        f"{' and '.join(fields)} becomes false"
        if fields
        else "their numbers keep them apart"
        if gguf
        else "their numbers keep them apart; transformers before 5 ties them again when it loads them"
    )
    count = "both are" if len(tie.names) == 2 else "all are"
    return f"{' and '.join(printable(name) for name in tie.names)} are tied, {how}: {count} written, {own}, and {said}"


def _same(embedding: Step, head: Step, adapters: Sequence[WeightedAdapter]) -> bool:
    """Whether both ends come out with the same numbers."""
    if embedding.action == head.action == "copy":
        return True
    if embedding.rows != head.rows:
        return False
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
        if (
            one.adapter != other.adapter
            or one.scaling != other.scaling
            or (one.dora, other.dora, one.transform, other.transform) != (None,) * 4
        ):
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


def _vocabulary(steps: Mapping[str, Step], ties: Ties, checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """The new vocab_size where embedding and head have another number of rows than the base's."""
    ends = {name: steps[name] for name in ties.ends if name in steps and len(steps[name].shape) == 2}
    resized = {
        name: step.shape[0]
        for name, step in ends.items()
        if step.replacement is not None and step.shape != checkpoint.tensors[str(step.source)].shape
    }
    if not resized:
        return {}, []
    before = {checkpoint.tensors[str(ends[name].source)].shape[0] for name in resized}
    rows = {n: step.shape[0] for n, step in ends.items() if checkpoint.tensors[str(step.source)].shape[0] in before}
    if len(set(rows.values())) > 1:
        raise ShapeMismatchError(
            "the adapter resizes the vocabulary for one end only: "
            + ", ".join(f"{printable(name)} would have {count} rows" for name, count in rows.items()),
            hint="save the adapter with both (PEFT: modules_to_save, or ensure_weight_tying), then merge again",
        )
    size = next(iter(resized.values()))
    field = "text_config.vocab_size" if "vocab_size" not in (checkpoint.config or {}) else "vocab_size"
    return {field: size}, [f"the vocabulary has {size} rows now: {', '.join(printable(name) for name in resized)} replaced"]

"""Biases that a base lacks and an adapter's lora_bias gives it, which PEFT trains and does not merge.

A layer without a bias is one whose bias is zero. So a model in memory is given the biases that change. In files the class of the
model must ask for them when it loads: the field of config.json that makes it do so is set where `biases.json` knows it, which
`scripts/make_biases.py` made of transformers, never a hand. Such a field gives biases to layers of several kinds; those that no
adapter changes are written as zeros, which change nothing, so that the class finds all that it asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..adapters.adapter import WeightedAdapter
from ..checkpoints.checkpoint import Checkpoint
from ..errors import printable
from ..files.expression import Zeros
from .plan import Step


@dataclass(frozen=True)
class Lacking:
    """Biases that a base could have: by name the weight beside each. `field` of config.json gives them all, "" where none does."""

    weights: Mapping[str, str]
    field: str = ""


def lacking(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter]) -> tuple[Lacking, ...]:
    """What `checkpoint` could have; nothing where no adapter would change it."""
    if not any(module.lora_bias is not None for each in adapters for module in each.adapter.modules.values()):
        return ()
    if checkpoint.live:
        return tuple(Lacking({_bias_of(name): name}) for name in checkpoint.without_bias)
    return tuple(_of_config(checkpoint))


def with_zeros(checkpoint: Checkpoint, several: Sequence[Lacking]) -> Checkpoint:
    """`checkpoint` with the biases that it lacks, as zeros."""
    held = checkpoint.tensors
    new = {bias: Zeros(held[weight].shape[:1]) for each in several for bias, weight in each.weights.items()}
    return replace(checkpoint, tensors={**held, **new}) if new else checkpoint


def zero_steps(checkpoint: Checkpoint, several: Sequence[Lacking]) -> dict[str, Step]:
    """How each bias comes about that nothing is added to."""
    pairs = [pair for each in several for pair in each.weights.items()]
    return {b: Step(b, "cast", checkpoint.tensors[w].dtype, checkpoint.tensors[w].shape[:1]) for b, w in pairs}


def without_zeros(
    steps: Mapping[str, Step], several: Sequence[Lacking], *, live: bool
) -> tuple[dict[str, Step], dict[str, bool], list[str]]:
    """`steps` without the biases that no adapter needs; the fields of config.json that change; notes."""
    left, fields, notes = dict(steps), dict[str, bool](), list[str]()
    given = [bias for each in several for bias in each.weights if left[bias].addends]
    for each in several:
        changed = [bias for bias in each.weights if left[bias].addends]
        if not changed:
            for bias in each.weights:
                left.pop(bias)
        elif each.field:
            fields[each.field] = True
            zeros = len(each.weights) - len(changed)
            rest = f", and zeros are written for {zeros} more that this gives" if zeros else ""
            notes.append(f"the base has no {_some(changed)}, which lora_bias trained: {each.field} becomes true{rest}")
    if given and live:
        notes.append(
            f"the model had no {_some(given)}, which lora_bias trained: its layers have them while it is merged, and its"
            " configuration does not ask for them: what save_pretrained writes is loaded without; merge into its files instead"
        )
    return left, fields, notes


def _of_config(checkpoint: Checkpoint) -> Iterator[Lacking]:
    config, held = checkpoint.config or {}, checkpoint.tensors
    for entry in known_biases(config):
        for forms in (entry["modules"], entry.get("stored", ())):
            asked = [re.compile(re.escape(form).replace(r"\*", r"\d+") + r"\.weight") for form in forms]
            weights = [name for name in held if any(each.fullmatch(name) for each in asked)]
            pairs = {_bias_of(name): name for name in weights}
            plain = all(len(held[name].shape) > 1 and name not in checkpoint.encoded for name in weights)
            if pairs and plain and pairs.keys().isdisjoint(held):
                yield Lacking(pairs, ".".join(part for part in (entry["at"], entry["field"]) if part))
                break


def known_biases(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The fields that give biases to a model with this config.json, as the table has them; none where its class is not known."""
    table, architectures = _table(), config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if not isinstance(name, str) or name not in table["classes"] or config.get("auto_map"):
        return []
    return [entry for entry in table["models"][table["classes"][name]] if _is_of(entry, config)]


def _is_of(entry: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the part of the configuration that the field is in is of the kind that the table was made with."""
    part: Any = config
    for name in entry["at"].split(".") if entry["at"] else ():
        part = part.get(name) if isinstance(part, Mapping) else None
    return isinstance(part, Mapping) and ("type" not in entry or part.get("model_type") == entry["type"])


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('weight')}bias"


def _some(names: Sequence[str]) -> str:
    return printable(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("biases.json").read_text())
    return found

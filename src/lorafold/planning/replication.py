"""PEFT's layer_replication: a model that was trained as a longer one, whose layers are some of the base's, several of them twice.

While PEFT trains, the copies of a layer share its weights, and each has its own update. Merged they differ, so each is written as a
tensor of its own. Which files of weights they go into, and what is added to them, is decided as for any other base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters.adapter import WeightedAdapter
from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, PlanError, ShapeMismatchError, UnsupportedAdapterError, printable

_LAYER = re.compile(r"(?P<list>(?:model\.)*(?:bert\.|transformer\.)?(?:layers|encoder\.layer|h))\.(?P<number>\d+)\.(?P<rest>.+)")
"""A tensor of a layer, where PEFT looks for them (`tuners/tuners_utils.py`, `replicate_layers`)."""

_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "block_types")
"""Fields of config.json with an entry for each layer."""

_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "moe_layers", "cross_attention_layers")
"""Fields that list numbers of layers."""

_BY_NUMBER = (
    "first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "num_kv_shared_layers",
    "sliding_window_pattern", "full_attention_interval", "attn_layer_period", "expert_layer_period",
)  # fmt: skip
"""Fields by which a layer is of one kind or another by its number alone; of no effect where they are 0, 1 or null."""


def replicated(checkpoint: Checkpoint, adapters: Sequence[WeightedAdapter]) -> tuple[Mapping[str, str], dict[str, Any], list[str]]:
    """The tensors of the model that `adapters` are for, each with the name of the base's that it is; the fields of config.json that
    change; notes, none where the model is as the base.

    Raises `PlanError` where the adapters are for different models, `UnsupportedAdapterError`, `CheckpointError` or
    `ShapeMismatchError` where the base's layers cannot be put together so.
    """
    layers = {weighted.adapter.layers for weighted in adapters}
    if layers <= {()}:
        return {name: name for name in checkpoint.tensors}, {}, []
    names = ", ".join(printable(weighted.adapter.name) for weighted in adapters)
    if len(layers) > 1:
        raise PlanError(
            f"{names} are for models of different layers: layer_replication is {', '.join(map(_shown, sorted(layers)))}",
            hint="merge one, then another into its output, if it was trained on that",
        )
    if checkpoint.live:
        raise UnsupportedAdapterError(
            f"{names}: layer_replication makes another model of the base's layers; a model in memory keeps its own",
            hint="nothing was changed; merge the adapter into the model's files, and load those",
        )
    chosen = [number for first, stop in layers.pop() for number in range(first, stop)]
    by_number, prefix, count = _layers(checkpoint)
    if max(chosen) >= count:
        raise ShapeMismatchError(
            f"{names}: layer_replication asks for layer {max(chosen)}, but {printable(str(checkpoint.root))} has {count} layers",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    origins: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in by_number:
            number, rest = by_number[name]
            origins |= {f"{prefix}.{i}.{rest}": name for i, each in enumerate(chosen) if each == number}
        else:
            origins[name] = name
    lost = sorted(set(range(count)) - set(chosen))
    note = f"the model has {len(chosen)} layers, made of the base's {count} (layer_replication): {_shown_numbers(chosen)}"
    return origins, _fields(checkpoint, chosen, count), [note + (f"; left out: {_shown_numbers(lost)}" if lost else "")]


def _layers(checkpoint: Checkpoint) -> tuple[dict[str, tuple[int, str]], str, int]:
    """For each tensor of a layer its number and the rest of the name; what stands before all numbers; how many layers there are."""
    found = {name: match for name in checkpoint.tensors if (match := _LAYER.fullmatch(name))}
    lists = {match["list"] for match in found.values()}
    numbers = {int(match["number"]) for match in found.values()}
    if len(lists) != 1 or numbers != set(range(len(numbers))):
        what = (
            "has no layers"
            if not lists
            else f"has layers at {', '.join(sorted(lists))}, numbered {_shown_numbers(sorted(numbers))}"
        )
        raise CheckpointError(
            f"{printable(str(checkpoint.root))} {what}: layer_replication is for models with one list of layers, as Llama, BERT and"
            " Falcon have it",
            hint="nothing was written",
        )
    return {name: (int(match["number"]), match["rest"]) for name, match in found.items()}, lists.pop(), len(numbers)


def _fields(checkpoint: Checkpoint, chosen: Sequence[int], count: int) -> dict[str, Any]:
    """The fields of config.json that say how many layers there are, and of which kind each is."""
    config = checkpoint.config or {}
    if config.get("num_hidden_layers") != count:
        raise CheckpointError(
            f"{printable(str(checkpoint.root))} has {count} layers, but num_hidden_layers of its config.json is"
            f" {config.get('num_hidden_layers')!r}, so that what layer_replication makes of it could not be said there",
            hint="nothing was written; put the config.json of the base model beside its weights",
        )
    for name in _BY_NUMBER:
        if config.get(name) not in (None, 0, 1, False):
            raise UnsupportedAdapterError(
                f"{printable(str(checkpoint.root))}: {name} of its config.json is {config[name]!r}, so that a layer is of another"
                " kind where layer_replication gives it another number",
                hint="nothing was written; serve this adapter unmerged",
            )
    fields: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    for name in _LISTS:
        if isinstance(config.get(name), list) and len(config[name]) == count:
            fields[name] = [config[name][number] for number in chosen]
    for name in _NUMBERS:
        if isinstance(config.get(name), list):
            fields[name] = [i for i, number in enumerate(chosen) if number in config[name]]
    return {name: value for name, value in fields.items() if value != config.get(name)}


def _shown(layers: tuple[tuple[int, int], ...]) -> str:
    return str([list(pair) for pair in layers])


def _shown_numbers(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:40])
    return shown if len(numbers) <= 40 else f"{shown}, …"

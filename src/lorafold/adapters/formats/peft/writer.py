"""PEFT's directory: a rank and an alpha for each module in patterns, and all that PEFT's LoRA holds beside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....errors import UnsupportedAdapterError, printable
from ...convert.request import Update, WriteRequest, WrittenAdapter, refuse, safetensors_bytes
from ...convert.scalings import alpha_for, stored, with_alpha, with_scaling
from ...numbers import AdapterReader
from ..mlx.reader import EMBEDDINGS

_PREFIX = "base_model.model."


def write_peft(request: WriteRequest) -> WrittenAdapter:
    """`adapter_config.json` and `adapter_model.safetensors`.

    Raises `UnsupportedAdapterError` where DoRA or biases are of some modules only, or layers stand several times.
    """
    request = request.of_one_model()
    refuse(request, "peft", whole=False, rows=False)
    for update in request.updates:
        if update.magnitude is not None and not update.embedding and update.name.rpartition(".")[2] in EMBEDDINGS:
            raise UnsupportedAdapterError(
                f"{request.shown}: {printable(update.name)} has magnitudes for the rows of an embedding, PEFT has columns",
                hint="nothing was written; merge the adapter instead",
            )
    updates, notes = peft_updates(request)
    tensors = {f"{_PREFIX}{update.name}.{part}": tensor for update in updates for part, tensor in peft_tensors(update).items()}
    fields = peft_fields(updates) | {
        "base_model_name_or_path": request.adapter.base_model, "fan_in_fan_out": request.adapter.fan_in_fan_out,
        "task_type": None, "auto_mapping": None,
    }  # fmt: skip
    adapted = {update.name for update in updates}
    with AdapterReader(request.adapter) as reader:
        for name, info in request.adapter.replacements.items():
            module, _, parameter = name.rpartition(".")  # PEFT wraps what it adapts, and the wrapped layer holds the rest
            tensors[f"{_PREFIX}{module}.base_layer.{parameter}" if module in adapted else f"{_PREFIX}{name}"] = reader.tensor(info)
        for name, rows in request.adapter.rows.items():
            tensors[f"{_PREFIX}{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"] = reader.tensor(rows.values)
    whole = {name.rpartition(".")[0] for name in request.adapter.replacements if not name.endswith(".bias")} - adapted
    biases = {name.removesuffix(".bias") for name in request.adapter.replacements if name.endswith(".bias")} - whole
    fields["modules_to_save"] = sorted(whole) or None
    if biases:
        fields["bias"] = "lora_only" if biases <= adapted else "all"
    rows_of = {name.removesuffix(".weight"): list(rows.indices) for name, rows in request.adapter.rows.items()}
    if rows_of:
        fields["trainable_token_indices"] = rows_of
    text = json.dumps(fields, indent=2) + "\n"
    return WrittenAdapter(
        {"adapter_config.json": text.encode(), "adapter_model.safetensors": safetensors_bytes(tensors)}, tuple(notes)
    )


def peft_updates(request: WriteRequest, *, zero: bool = True) -> tuple[list[Update], list[str]]:
    """The updates of `request` with factors that are an alpha of their rank; and notes. `zero`: whether an alpha of 0 means 0."""
    for part, what in (("magnitude", "DoRA's magnitudes"), ("lora_bias", "biases of lora_B")):
        can = [update for update in request.updates if part == "magnitude" or not update.embedding]
        have = [update for update in can if getattr(update, part) is not None]
        if have and len(have) < len(can):
            lacking = next(update for update in can if getattr(update, part) is None)
            raise UnsupportedAdapterError(
                f"{request.shown}: {printable(have[0].name)} has {what} and {printable(lacking.name)} has not: PEFT's format has"
                " one"
                " word for all modules",
                hint="nothing was written; merge the adapter instead",
            )
    updates, notes = stored(request.updates, rounded=request.rounded)
    updates = [with_alpha(update) for update in updates]
    stated = {update.name for update in updates if _alpha(update) is not None and (zero or update.scaling != 0)}
    updates, more = with_scaling(updates, lambda update: update.scaling if update.name in stated else 1.0, rounded=request.rounded)
    return updates, [*notes, *more]


def peft_fields(updates: Sequence[Update]) -> dict[str, Any]:
    """The fields of a LoraConfig that say what `updates` are."""
    ranks = {update.name: update.r for update in updates}
    alphas = {update.name: _whole(_alpha(update) or 0.0) for update in updates}
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_bias": any(update.lora_bias is not None for update in updates),
        "use_rslora": False,
        "use_dora": any(update.magnitude is not None for update in updates),
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }


def peft_tensors(update: Update) -> Mapping[str, Tensor]:
    """The tensors of `update` by what PEFT puts after the module's name."""
    first, second = ("lora_embedding_A", "lora_embedding_B") if update.embedding else ("lora_A.weight", "lora_B.weight")
    tensors = {first: update.lora_A, second: update.lora_B}
    if update.lora_bias is not None:
        tensors["lora_B.bias"] = update.lora_bias
    if update.magnitude is not None:
        shape = (1, -1, *(1 for _ in update.kernel)) if update.kernel else (-1,)
        tensors["lora_magnitude_vector"] = update.magnitude.reshape(shape)
    return tensors


def _alpha(update: Update) -> float | None:
    return alpha_for(update.scaling, update.r, update.lora_alpha)


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Where `values` differ from `default`. The first pattern that ends a module's name counts, so the longest stand first, and
    every module has one as soon as one has."""
    if all(value == default for value in values.values()):
        return {}
    return {re.escape(name): values[name] for name in sorted(values, key=lambda name: (-len(name), name))}

"""mlx-lm's folder: one rank and one scale for all modules, factors transposed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ....errors import UnsupportedAdapterError, printable
from ...convert.request import Update, WriteRequest, WrittenAdapter, refuse, refuse_parts, safetensors_bytes
from ...convert.scalings import one_for_all, stored, with_rank, with_scaling
from .reader import CONFIG_NAME, EMBEDDINGS, EXPERTS, WEIGHTS_NAME

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.([^.]+)")


def write_mlx(request: WriteRequest) -> WrittenAdapter:
    """`adapters.safetensors` and `adapter_config.json`. Smaller ranks are filled up with zeros, which adds nothing.

    Raises `UnsupportedAdapterError` for what mlx-lm's layers do not have.
    """
    request = request.of_one_model()
    refuse(request, "mlx")
    refuse_parts(request, "mlx", "lora_bias", "kernel")
    dora = [update for update in request.updates if update.magnitude is not None]
    if dora and (len(dora) < len(request.updates) or any(update.embedding for update in dora)):
        raise UnsupportedAdapterError(
            f"{request.shown}: mlx-lm has DoRA for all modules or none, and for the rows of an embedding, not for its columns:"
            f" {printable(dora[0].name)}",
            hint="nothing was written; choose peft",
        )
    scale = one_for_all(request.updates, lambda update: update.scaling)
    updates, notes = with_scaling(request.updates, lambda update: scale, rounded=request.rounded)
    updates, more = stored(updates, rounded=request.rounded)
    rank = max(update.r for update in updates)
    tensors: dict[str, Tensor] = {}
    alone, stacks = _stacks(updates, request)
    for name, experts in stacks.items():
        filled = [with_rank(update, rank) for update in experts]
        tensors[f"{name}.lora_a"] = torch.stack([update.lora_A for update in filled])  # (experts, r, in)
        tensors[f"{name}.lora_b"] = torch.stack([update.lora_B for update in filled])
    for update in alone:
        whole = with_rank(update, rank)
        A, B = whole.lora_A, whole.lora_B
        rows = not update.embedding and update.name.rpartition(".")[2] in EMBEDDINGS  # DoRA of an embedding's rows
        tensors |= {f"{update.name}.lora_a": B if rows else A.T, f"{update.name}.lora_b": A if rows else B.T}
        if update.magnitude is not None:
            tensors[f"{update.name}.m"] = update.magnitude
    if any(update.r < rank for update in updates):
        more.append(f"smaller ranks were filled up to {rank} with zeros")
    layers = {int(part) for update in updates for part in update.name.split(".") if part.isdecimal()}
    fields = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": request.adapter.base_model,
        "num_layers": max(layers, default=-1) + 1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({_key(name.removesuffix(".lora_a")) for name in tensors if name.endswith(".lora_a")}),
        },
    }
    text = json.dumps(fields, indent=4) + "\n"
    return WrittenAdapter({CONFIG_NAME: text.encode(), WEIGHTS_NAME: safetensors_bytes(tensors)}, (*notes, *more))


def _stacks(updates: Sequence[Update], request: WriteRequest) -> tuple[list[Update], dict[str, list[Update]]]:
    """The updates of modules that are one, and those of experts by the module that mlx-lm has for all of them, in order.

    Raises `UnsupportedAdapterError` where not all experts up to the last have one, or one has DoRA.
    """
    alone: list[Update] = []
    found: dict[str, dict[int, Update]] = {}
    for update in updates:
        match = _EXPERT.fullmatch(update.name)
        if match is None:
            alone.append(update)
            continue
        inside = {w: last for (around, last), w in EXPERTS.items() if match[1].endswith(around)}
        name = f"{match[1]}.switch_mlp.{inside.get(match[3], match[3])}"
        found.setdefault(name, {})[int(match[2])] = update
    for name, experts in found.items():
        if sorted(experts) != list(range(len(experts))) or any(update.magnitude is not None for update in experts.values()):
            raise UnsupportedAdapterError(
                f"{request.shown}: mlx-lm has one tensor for all experts, {printable(name)}, without DoRA; the adapter has"
                f" {len(experts)} of them, up to number {max(experts)}",
                hint="nothing was written; choose peft",
            )
    return alone, {name: [experts[e] for e in sorted(experts)] for name, experts in found.items()}


def _key(name: str) -> str:
    """The module within its layer, as mlx-lm lists them."""
    _, found, rest = name.rpartition("layers.")
    return rest.partition(".")[2] if found else name

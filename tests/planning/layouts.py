"""One model in several layouts, and one adapter in several forms: projections fused or apart, experts one by one or in a stack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorafold
from lorafold import LowRankUpdate
from models import edit_json, tensors
from oracle import correctly_rounded

HIDDEN, INNER, RANK, EXPERTS = 8, 6, 2, 3

QKV = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
"""Rows of each: four heads of two, of which keys and values have two."""

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

Pair = tuple[Tensor, Tensor]


def save_base(path: Path, held: Mapping[str, Tensor], **config: Any) -> Path:
    path.mkdir(parents=True)
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in held.items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def save_pairs(path: Path, pairs: Mapping[str, Pair], **config: Any) -> Path:
    """A PEFT directory with scaling 2 for the pairs (lora_A, lora_B) of modules."""
    path.mkdir(parents=True)
    held = {}
    for module, (lora_A, lora_B) in pairs.items():
        held[f"base_model.model.{module}.lora_A.weight"] = lora_A.contiguous()
        held[f"base_model.model.{module}.lora_B.weight"] = lora_B.contiguous()
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "rank_pattern": {}, "alpha_pattern": {}}
    for module, (lora_A, _) in pairs.items():
        if lora_A.shape[0] != RANK:
            name = module.replace(".", r"\.")
            fields["rank_pattern"][name], fields["alpha_pattern"][name] = lora_A.shape[0], 2 * lora_A.shape[0]
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return path


def random(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def pair(out: int, inner: int, seed: int) -> Pair:
    return random(RANK, inner, seed=2 * seed), random(out, RANK, seed=2 * seed + 1)


def fused_pair(pairs: list[Pair]) -> Pair:
    """The pair of the weights of `pairs` one under the other: lora_A joined, lora_B block by block."""
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.block_diag(*(lora_B for _, lora_B in pairs))


def merged(base: Path, adapter: Path, **options: Any) -> dict[str, Tensor]:
    out = base.parent / f"{base.name} {adapter.name}"
    lorafold.merge(base, [adapter], out, **options)
    return tensors(out)


def wanted(weight: Tensor, *pairs: Pair) -> Tensor:
    updates = [LowRankUpdate(lora_A, lora_B, 2.0) for lora_A, lora_B in pairs]
    return torch.from_numpy(correctly_rounded(weight.bfloat16(), updates, torch.bfloat16)).bfloat16()


def projections(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Pair]]:
    """The weights of one layer apart, and a pair for each."""
    sizes = {f"self_attn.{name}": rows for name, rows in QKV.items()} | {"mlp.gate_proj": INNER, "mlp.up_proj": INNER}
    weights = {name: random(rows, HIDDEN, seed=seed + 100 + i) for i, (name, rows) in enumerate(sizes.items())}
    return weights, {name: pair(rows, HIDDEN, seed + i) for i, (name, rows) in enumerate(sizes.items())}


def in_layer(held: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
    return {f"model.layers.0.{name}{ending}": value for name, value in held.items()}


FUSED = {"self_attn.qkv_proj": [f"self_attn.{name}" for name in QKV], "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"]}


def experts(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Pair]]:
    """Weights and pairs of gate, up and down projections of each expert."""
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    names = [f"{expert}.{leaf}" for expert in range(EXPERTS) for leaf in shapes]
    weights = {name: random(*shapes[name[2:]], seed=seed + 200 + i) for i, name in enumerate(names)}
    return weights, {name: pair(*shapes[name[2:]], seed + i) for i, name in enumerate(names)}


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(E, 2 · inner, hidden) with the gate before the up projection, and (E, hidden, inner)."""
    gate_up = [torch.cat([weights[f"{e}.gate_proj"], weights[f"{e}.up_proj"]]) for e in range(EXPERTS)]
    return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack([weights[f"{e}.down_proj"] for e in range(EXPERTS)])}


def mixtral(held: Mapping[str, Any]) -> dict[str, Any]:
    """What Mixtral calls the projections, in files of transformers 4 and 5 alike."""
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return {
        f"model.layers.0.block_sparse_moe.experts.{name[0]}.{names[name[2:]]}": value for name, value in held.items() if name[2:]
    }


def module(held: Mapping[str, Any]) -> dict[str, Any]:
    return {f"model.layers.0.mlp.experts.{name}": value for name, value in held.items()}


def weight(held: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.weight": value for name, value in held.items()}


def parameter_pairs(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same updates as PEFT stores them for bare parameters: lora_A (E · r, in), lora_B (out, r · E), the expert fastest."""
    gate_up = [fused_pair([pairs[f"{e}.gate_proj"], pairs[f"{e}.up_proj"]]) for e in range(EXPERTS)]
    down = [pairs[f"{e}.down_proj"] for e in range(EXPERTS)]
    return {f"experts{inner}": packed(each) for inner, each in ((".base_layer", gate_up), ("", down))}


def packed(pairs: list[Pair]) -> Pair:
    return torch.cat([lora_A for lora_A, _ in pairs]), torch.stack([lora_B for _, lora_B in pairs], dim=2).flatten(1)


def save_parameters(path: Path, pairs: Mapping[str, Pair], ranks: Mapping[str, int], **config: Any) -> Path:
    """A PEFT directory for bare parameters, of rank `ranks` each; the first that is registered is the innermost."""
    saved = save_pairs(path, {f"model.layers.0.mlp.{name}": each for name, each in pairs.items()})
    fields = {
        "target_parameters": [f"experts.{name}" for name in ranks],
        "rank_pattern": {rf".*\.{name}": r for name, r in ranks.items()},
        "alpha_pattern": {rf".*\.{name}": 2 * r for name, r in ranks.items()},
        "peft_version": "0.21.2",
    }
    edit_json(saved / "adapter_config.json", **fields | config)
    return saved


RANKS = {"gate_up_proj": 2 * RANK, "down_proj": RANK}

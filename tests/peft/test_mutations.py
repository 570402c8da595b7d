"""Adapters of every kind with one tensor changed: an error that names what is wrong, or the very same plan; never another ΔW."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold.errors import InputError
from peft_cases import CASES, build

PREFIX = "base_model.model."
KINDS = (
    "mlp lora_bias", "mlp bias lora_only", "mlp dora", "mlp kasa", "mlp pissa", "mlp bdlora", "mlp monteclora",
    "mlp modules_to_save", "embedding dora", "tokens", "convolutions", "Conv1D", "attention", "experts",
    "experts and a bare matrix",
)  # fmt: skip


def mutations(held: dict[str, Tensor]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """What was done, to which tensor, and what the file then holds."""
    for name, tensor in held.items():
        rest = {n: t for n, t in held.items() if n != name}
        module = name.rpartition(".lora_")[0]
        parts = name.removeprefix(PREFIX).split(".")
        yield "dropped", name, rest
        yield "renamed", name, rest | {f"{PREFIX}other.{name.removeprefix(PREFIX)}": tensor}
        if ".lora_" in name:
            yield "renamed in part", name, rest | {name.replace("lora_", "lara_").replace("weight", "wait"): tensor}
        yield "doubled", name, held | {name.removeprefix(PREFIX): tensor.clone()}
        yield "wrapped", name, rest | {PREFIX + ".".join([parts[0], "base_layer", *parts[1:]]): tensor}
        yield "cut", name, rest | {name: tensor[:-1].clone()}
        yield "longer", name, rest | {name: torch.cat([tensor, tensor[:1]])}
        yield "flattened", name, rest | {name: tensor.flatten()}
        if tensor.dim() > 1:
            yield "transposed", name, rest | {name: tensor.transpose(0, 1).contiguous()}
            yield "wider", name, rest | {name: torch.cat([tensor, tensor[:, :1]], 1)}
        if module:
            yield "pair dropped", name, {n: t for n, t in rest.items() if not n.startswith(f"{module}.lora_")}


def outcome(plan: lorafold.MergePlan) -> dict[str, object]:
    """What becomes of each tensor, whatever the tensors of the adapter are called."""
    return {
        step.tensor: (
            step.action,
            [(a.scaling, a.rows, a.section, len(a.stored), a.residual, a.dora) for a in step.addends],
            [new.indices for new in step.rows],
        )
        for step in plan.steps
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_change_passes_unnoticed(tmp_path: Path, kind: str) -> None:
    """What only changes a name that can still be told, or the shape of what is a row of numbers anyway, is the same update."""
    base, _, adapter, _ = build(CASES[kind], tmp_path)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    whole = lorafold.plan(base, [adapter])
    errors = 0
    for what, name, changed in mutations(held):
        tensor = changed.get(name)
        if what in ("transposed", "flattened") and tensor is not None and tensor.shape == held[name].shape:
            continue  # of a square one no shape tells
        save_file(changed, file)
        try:
            plan = lorafold.plan(base, [adapter])
        except InputError:
            errors += 1
            continue
        same = outcome(plan) == outcome(whole)
        left_out = name in whole.adapters[0].left_out
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0].replace(".base_layer", "")
        plain = name.removeprefix(PREFIX).replace(".base_layer", "")
        noted = any(each and each in note for note in plan.notes if note not in whole.notes for each in (module, plain))
        assert (same and (what in ("renamed", "wrapped", "flattened") or left_out)) or (
            noted and what in ("dropped", "pair dropped")
        ), (what, name, plan.notes)
    assert errors >= 5 * len(held) / 2

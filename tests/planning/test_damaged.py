"""Adapters for fused weights and experts, damaged: wherever their tensors land, each of them counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lorafold
from lorafold.errors import InputError
from models import edit_tensors, tensors
from planning.layouts import (
    FUSED,
    HEADS,
    RANKS,
    experts,
    fused_pair,
    in_layer,
    mixtral,
    module,
    parameter_pairs,
    projections,
    save_base,
    save_pairs,
    save_parameters,
    stacked,
    weight,
)


def forms(path: Path) -> list[tuple[Path, Path]]:
    """(base, adapter) in the forms above."""
    weights, pairs = projections()
    together = {whole: torch.cat([weights[part] for part in parts]) for whole, parts in FUSED.items()}
    of_experts, expert_pairs = experts()
    joined = {whole: fused_pair([pairs[part] for part in parts]) for whole, parts in FUSED.items()}
    apart = save_base(path / "apart", in_layer(weights, ".weight"), model_type="llama", **HEADS)
    fused = save_base(path / "fused", in_layer(together, ".weight"), model_type="phi3", **HEADS)
    one_by_one = save_base(path / "one by one", weight(mixtral(of_experts)), model_type="mixtral")
    stack = save_base(path / "stack", module(stacked(of_experts)), model_type="mixtral")
    return [
        (fused, save_pairs(path / "single", in_layer(pairs))),
        (apart, save_pairs(path / "both", in_layer(joined))),
        (stack, save_pairs(path / "older", mixtral(expert_pairs))),
        (one_by_one, save_parameters(path / "parameters", parameter_pairs(expert_pairs), RANKS)),
    ]


def damage(kind: str, name: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    tensor = held[name]
    if kind == "dropped":
        return {other: each for other, each in held.items() if other != name}
    if kind == "renamed":
        return {
            other.replace("_proj.", "_prj.").replace("experts", "expert") if other == name else other: each
            for other, each in held.items()
        }
    if kind == "doubled":
        return held | {name.replace(".lora_", ".default.lora_"): tensor.clone()}
    changed = {"transposed": tensor.T, "longer": torch.cat([tensor, tensor[:1]]), "narrower": tensor[:, :-1]}[kind]
    return held | {name: changed.contiguous()}


@pytest.mark.parametrize("kind", ["dropped", "renamed", "doubled", "transposed", "longer", "narrower"])
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_damaged_tensor_is_an_error(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """Wherever the tensors of such an adapter land, each of them counts."""
    path = tmp_path_factory.mktemp("damage")
    base, adapter = data.draw(st.sampled_from(forms(path)))
    name = data.draw(st.sampled_from(sorted(tensors(adapter))))
    rows, columns = tensors(adapter)[name].shape
    assume(kind != "transposed" or rows != columns)  # nothing tells a square matrix from its transpose
    edit_tensors(adapter, lambda held: damage(kind, name, held))
    with pytest.raises(InputError):
        lorafold.merge(base, [adapter], path / "out")
    assert not (path / "out").exists()

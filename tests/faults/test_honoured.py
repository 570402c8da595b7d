"""Row 16: every field that changes the sum is in the sum, held against one computed apart; and row 54, names of other trainers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold import LowRankUpdate
from models import different, expected, tensors

SHARD = "model-00001-of-00002.safetensors"
MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
Q0, V1 = MODULES[0], MODULES[3]
EMBED = "model.embed_tokens.weight"


def factors(road: Any) -> dict[str, tuple[Tensor, Tensor]]:
    held = load_file(road.adapter / "adapter_model.safetensors")
    return {m: (held[f"base_model.model.{m}.lora_A.weight"], held[f"base_model.model.{m}.lora_B.weight"]) for m in MODULES}


def merged_as(road: Any, scalings: dict[str, float], others: dict[str, Tensor] | None = None, **biases: Tensor) -> None:
    """The merge holds Σ scaling · B A for each module, `others` in their places, and biases with scaled columns added."""
    updates = {f"{m}.weight": [LowRankUpdate(*factors(road)[m], scaling)] for m, scaling in scalings.items()}
    for name, column in biases.items():
        updates[name] = [LowRankUpdate(torch.ones(1, 1), column[:, None].float(), scalings[name.removesuffix(".bias")])]
    road.merge()
    wanted = expected(tensors(road.base), updates, others or {})
    assert different(tensors(road.out), wanted) == {}
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


def test_row_16_rslora(road: Any) -> None:
    road.config(use_rslora=True)
    merged_as(road, dict.fromkeys(MODULES, 4 / math.sqrt(2)))


def test_row_16_patterns_of_rank_and_alpha(road: Any) -> None:
    """v_proj of layer 1 has rank 3 and its own alpha; the rest what the configuration says for all."""
    A, B = torch.randn(3, 8), torch.randn(8, 3)
    road.edit(**{f"base_model.model.{V1}.lora_A.weight": A, f"base_model.model.{V1}.lora_B.weight": B})
    road.refused("adapter_config.json", "r says rank 2", "have rank 3")
    road.config(rank_pattern={r"layers\.1\.v_proj": 3}, alpha_pattern={r"layers\.1\.v_proj": 7, "q_proj": 6})
    merged_as(road, {m: 7 / 3 if m == V1 else 3.0 if "q_proj" in m else 2.0 for m in MODULES})


def with_tensor(road: Any, name: str, tensor: Tensor) -> None:
    road.shard(**{name: tensor})
    road.index(lambda weight_map: weight_map.update({name: SHARD}))


def test_row_16_biases(road: Any) -> None:
    bias, column = torch.randn(8).bfloat16(), torch.randn(8)
    with_tensor(road, f"{Q0}.bias", bias)
    held = load_file(road.adapter / "adapter_model.safetensors")
    road.edit(**{name: None for name in held if Q0 not in name}, **{f"base_model.model.{Q0}.lora_B.bias": column})
    road.refused("lora_bias", Q0)  # in the file, not in the configuration
    road.config(lora_bias=True, target_modules=["q_proj"])
    updates = [LowRankUpdate(held[f"base_model.model.{Q0}.lora_A.weight"], held[f"base_model.model.{Q0}.lora_B.weight"], 2.0)]
    road.merge()
    added = [LowRankUpdate(torch.ones(1, 1), column[:, None], 2.0)]
    wanted = expected(tensors(road.base), {f"{Q0}.weight": updates, f"{Q0}.bias": added}, {})
    assert different(tensors(road.out), wanted) == {}


def test_row_16_saved_modules(road: Any) -> None:
    norm = torch.randn(8)
    road.edit(**{"base_model.model.model.layers.0.norm.weight": norm})
    road.refused("model.layers.0.norm")  # in the file, not in the configuration
    road.config(modules_to_save=["norm"])
    merged_as(road, dict.fromkeys(MODULES, 2.0), {"model.layers.0.norm.weight": norm})


def test_row_16_trained_rows(road: Any) -> None:
    embedding, rows = torch.randn(12, 8).bfloat16(), torch.randn(2, 8)
    with_tensor(road, EMBED, embedding)
    road.edit(**{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows})
    road.refused("embed_tokens")  # in the file, not in the configuration
    road.config(trainable_token_indices={"embed_tokens": [3, 7]})
    changed = embedding.clone()
    changed[[3, 7]] = rows.bfloat16()
    merged_as(road, dict.fromkeys(MODULES, 2.0), {EMBED: changed})


@pytest.mark.parametrize(
    "fields",
    [{"modules_to_save": ["norm"]}, {"lora_bias": True}, {"trainable_token_indices": [1]}, {"use_dora": True}],
    ids=lambda fields: next(iter(fields)),
)
def test_row_16_what_the_configuration_promises_and_the_file_lacks(road: Any, fields: Any) -> None:
    road.config(**fields)
    code, out, err = road.run("merge", road.base, road.adapter, "-o", road.out)
    said = out + err
    assert next(iter(fields)) in said or "magnitude" in said or str(next(iter(fields.values()))) in said, said
    assert code == 1 or "note" in out


def kohya(road: Any, prefix: str, name: str = "kohya.safetensors") -> Path:
    """The adapter in kohya's spelling: one file, `_` for `.`, lora_down and lora_up, an alpha for each module."""
    held = {}
    for module, (A, B) in factors(road).items():
        spelled = prefix + module.replace(".", "_")
        held[f"{spelled}.lora_down.weight"], held[f"{spelled}.lora_up.weight"] = A.clone(), B.clone()
        held[f"{spelled}.alpha"] = torch.tensor(4.0)
    file: Path = road.folder / name
    save_file(held, file)
    return file


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", "lycoris_"])
def test_row_54_kohyas_names_lead_to_the_same_bits(road: Any, prefix: str) -> None:
    file = kohya(road, prefix)
    road.merge()
    wanted = tensors(road.out)
    road.merge("--overwrite", adapters=(file,))
    assert different(tensors(road.out), wanted) == {}
    receipt = road.receipt()
    assert receipt["adapters"][0]["format"] in ("kohya", "lycoris")
    for module in MODULES:  # which name went where is written down
        assert re.search(module.replace(".", "[._]"), receipt["tensors"][f"{module}.weight"]["updates"][0]["module"])


def test_row_54_a_name_with_two_readings_is_refused(road: Any) -> None:
    with_tensor(road, "model.layers_0.q_proj.weight", torch.zeros(8, 8).bfloat16())
    file = kohya(road, "lora_unet_")
    road.refused(
        "AmbiguousNameError", "lora_unet_model_layers_0_q_proj", "model.layers.0.q_proj.weight", "model.layers_0.q_proj.weight",
        adapters=(file,),
    )  # fmt: skip


def test_row_54_a_renamed_prefix_is_shown(road: Any) -> None:
    held = load_file(road.base / SHARD)
    save_file({name.removeprefix("model."): tensor for name, tensor in held.items()}, road.folder / "inner.safetensors")
    half = load_file(road.adapter / "adapter_model.safetensors")
    road.edit(**{name: None for name in half if "layers.1" in name})
    code, out, _ = road.run("plan", road.folder / "inner.safetensors", road.adapter)
    assert code == 0
    assert "tensor names of adapter rewritten: 'model.' → ''" in out
    plan = json.loads(road.run("plan", road.folder / "inner.safetensors", road.adapter, "--json")[1])
    assert any("rewritten" in note for note in plan["notes"])

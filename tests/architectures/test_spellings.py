"""Adapters and bases of transformers 4 and 5, and files under the names that modules have: all lead to the same model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from architectures.zoo import ARCHITECTURES, adapted, built, outputs, plainly, relative, saved
from lorafold.errors import UnmatchedAdapterError
from models import different, refused, rewritten, tensors

RENAMED = ("gpt_neox", "mixtral", "qwen3_moe", "deepseek_v3", "vit", "llava", "qwen2_vl")
"""Those that transformers writes under other names than their modules have."""


@pytest.mark.parametrize("name", RENAMED)
def test_a_base_under_the_names_of_its_modules(tmp_path: Path, name: str) -> None:
    """The same numbers, tensor by tensor, as in the model that transformers loads from its own kind of file."""
    architecture = ARCHITECTURES[name]
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    own = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    assert own.keys() != tensors(tmp_path / "base").keys()
    save_file(own, tmp_path / "modules" / "model.safetensors", {"format": "pt"})
    saved(adapted(model, architecture), tmp_path / "adapter")
    for base in ("base", "modules"):
        lorafold.merge(tmp_path / base, [tmp_path / "adapter"], tmp_path / f"{base} merged")
    loaded = type(model).from_pretrained(tmp_path / "base merged", dtype=torch.float64).state_dict()
    exact = {key: tensor for key, tensor in loaded.items() if tensor.dtype == torch.float64}  # routers are loaded in float32
    assert len(exact) >= len(loaded) - 2
    assert different({key: tensors(tmp_path / "modules merged")[key] for key in exact}, exact) == {}


def in_order(*pairs: tuple[str, str]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return rename


OLDER = {
    "gpt_neox": in_order(("lm_head", "embed_out")),
    "vit": in_order(
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.o_proj", "attention.output.dense"),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ),
    "llava": in_order(
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector", "multi_modal_projector"),
    ),
    "qwen2_vl": in_order(("model.language_model.", "model."), ("model.visual.", "visual.")),
}
"""What transformers 4 called the modules."""


@pytest.mark.parametrize("name", OLDER)
def test_an_adapter_under_the_names_of_older_modules(tmp_path: Path, name: str) -> None:
    architecture, prefix, rename = ARCHITECTURES[name], "base_model.model.", OLDER[name]
    if name == "gpt_neox":
        architecture = replace(architecture, targets=["query_key_value", "lm_head"])
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    saved(adapted(model, architecture), tmp_path / "newer")
    rewritten(
        tmp_path / "newer",
        tmp_path / "older",
        rename=lambda key: prefix + rename(key.removeprefix(prefix)),
        target_modules=None,
    )
    for adapter in ("newer", "older"):
        lorafold.merge(tmp_path / "base", [tmp_path / adapter], tmp_path / f"{adapter} merged")
    assert different(tensors(tmp_path / "older merged"), tensors(tmp_path / "newer merged")) == {}


EXPERTS = {
    "mixtral": ("block_sparse_moe", {"w1": (40, 32), "w3": (40, 32), "w2": (32, 40)}, 2),
    "qwen3_moe": ("mlp", {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}, 2),
}
"""The block of experts in transformers 4, its projections with the shapes of their weights, and how many layers have one."""


def one_by_one(path: Path, block: str, shapes: Mapping[str, tuple[int, int]], layers: int) -> Path:
    """An adapter for each projection of each expert, as transformers 4 had them."""
    torch.manual_seed(3)
    held: dict[str, Any] = {}
    for layer in range(layers):
        for expert in range(4):
            for name, (out, inner) in shapes.items():
                module = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                held[f"{module}.lora_A.weight"] = torch.randn(4, inner) * 0.1
                held[f"{module}.lora_B.weight"] = torch.randn(out, 4) * 0.1
    path.mkdir()
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted(shapes), "peft_version": "0.17.1"}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize("original", [True, False], ids=["experts one by one", "experts in stacks"])
@pytest.mark.parametrize("name", EXPERTS)
def test_an_adapter_for_experts_one_by_one(tmp_path: Path, name: str, original: bool) -> None:
    """PEFT joins such an adapter into one for the stacks when it loads it; merged, it computes the same, whatever the base's files
    look like.
    """
    import peft

    architecture = ARCHITECTURES[name]
    model = built(architecture)
    model.save_pretrained(tmp_path / "base", save_original_format=original)
    adapter = one_by_one(tmp_path / "adapter", *EXPERTS[name])
    stored = tensors(tmp_path / "base")
    assert any("experts.gate_up_proj" in key for key in stored) is not original
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, adapter).double().eval()
    wanted = outputs(wrapped, architecture)
    lorafold.merge(tmp_path / "base", [adapter], tmp_path / "out")
    merged = plainly(type(model).from_pretrained(tmp_path / "out", dtype=torch.float64))
    assert relative(outputs(merged, architecture), wanted) < 1e-6  # as in test_architectures


def test_names_of_one_part_that_lead_nowhere_leave_nothing_half_done(tmp_path: Path) -> None:
    """The vision tower of such an adapter is found, the language model is not: that is an error, not half a merge."""
    architecture = ARCHITECTURES["llava"]
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    saved(adapted(model, architecture), tmp_path / "adapter")
    wrong = rewritten(
        tmp_path / "adapter",
        tmp_path / "wrong",
        rename=lambda key: key.replace("language_model.layers", "speech.layers"),
        target_modules=None,
    )
    refused(tmp_path / "base", [wrong], UnmatchedAdapterError, "14 of 28", "model.speech.layers.0.mlp.down_proj")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_an_adapter_of_the_language_model_alone(tmp_path: Path, name: str) -> None:
    """Trained on the text model by itself, head and all; the vision tower stays as it is."""
    architecture = replace(ARCHITECTURES[name], targets=r".*language_model.*(q_proj|down_proj)|lm_head")
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    saved(adapted(model, architecture), tmp_path / "whole")
    rename = in_order(("model.language_model.", "model."))
    alone = rewritten(tmp_path / "whole", tmp_path / "alone", rename=rename, target_modules=["q_proj", "down_proj", "lm_head"])
    for adapter in (tmp_path / "whole", alone):
        lorafold.merge(tmp_path / "base", [adapter], tmp_path / f"{adapter.name} merged")
    assert different(tensors(tmp_path / "alone merged"), tensors(tmp_path / "whole merged")) == {}


@pytest.mark.parametrize("name", ["mixtral", "vit", "llava"])
def test_older_names_find_the_modules_of_a_live_model(tmp_path: Path, name: str) -> None:
    """Tensor by tensor what merging the files gives."""
    architecture, prefix = ARCHITECTURES[name], "base_model.model."
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    if name in EXPERTS:
        adapter = one_by_one(tmp_path / "adapter", *EXPERTS[name])
    else:
        newer, rename = saved(adapted(built(architecture), architecture), tmp_path / "newer"), OLDER[name]
        adapter = rewritten(
            newer,
            tmp_path / "older",
            rename=lambda key: prefix + rename(key.removeprefix(prefix)),
            target_modules=None,
        )
    lorafold.merge(tmp_path / "base", [adapter], tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float64)
    lorafold.merge_into(model, [adapter], precision="exact")
    assert different(dict(model.state_dict()), dict(merged.state_dict())) == {}

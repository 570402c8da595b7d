"""ensure_weight_tying: what PEFT puts on both ends of a tied model is one update of the one tensor that they share."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorafold
import models
from lorafold.errors import AdapterError, UnsupportedAdapterError
from models import edit_tensors, peft_model, refused, save_adapter, save_base, tensors

LLAMA = "LlamaForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(models.llama(tied=True), tmp_path_factory.mktemp("tied") / "base", max_shard_size="1GB")


def trained(base: Path, path: Path, **config: Any) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return save_adapter(model, path, ensure_weight_tying=True, **config)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).view(2, 12)).logits


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 40]},
    ],
    ids=lambda config: list(config)[-1],
)
def test_both_ends_stay_one(tmp_path: Path, base: Path, config: dict[str, Any]) -> None:
    adapter = trained(base, tmp_path / "adapter", **config)
    report = lorafold.merge(base, [adapter], tmp_path / "out", dtype="F64")
    assert report.proof is not None
    assert report.proof.share == 1.0
    assert HEAD not in tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    right = logits(peft_model(base, adapter, LLAMA, torch.float64))
    assert (found - right).norm() / right.norm() < 1e-10


def test_the_update_counts_once_where_pefts_own_merge_adds_it_twice(tmp_path: Path, base: Path) -> None:
    """PEFT merges embedding and head one after the other, both into the tensor that they share (seen with 0.21.2)."""
    import peft

    adapter = trained(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    lorafold.merge(base, [adapter], tmp_path / "out", dtype="F64")
    held, before = tensors(adapter), tensors(base)[EMBEDDING].double()
    A, B = (held[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"].double() for part in "AB")
    delta = 1.5 * (B @ A).T
    assert torch.equal(held[f"{PREFIX}lm_head.lora_A.weight"].double(), B.T)
    assert torch.allclose(tensors(tmp_path / "out")[EMBEDDING], before + delta, rtol=0, atol=2.0**-50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        wrapped = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        theirs = wrapped.merge_and_unload().get_input_embeddings().weight.detach()
    assert torch.allclose(theirs, before + 2 * delta, rtol=0, atol=2.0**-40)


def test_a_residual_of_a_tied_end_is_refused(tmp_path: Path, base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head"], init_lora_weights="pissa")
    refused(base, [adapter], UnsupportedAdapterError, "lm_head is tied to the other end of the model")


def test_a_residual_that_was_saved(tmp_path: Path) -> None:
    """PEFT saves a head that is targeted as it is then: what PiSSA left of it. That is not taken out once more."""
    base = save_base(models.llama(), tmp_path / "base", max_shard_size="1GB")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"], init_lora_weights="pissa")
    held = tensors(adapter)
    left = held[f"{PREFIX}lm_head.base_layer.weight"]
    assert not torch.equal(left, tensors(base)[HEAD])
    report = lorafold.merge(base, [adapter], tmp_path / "out", dtype="F64")
    assert report.proof is not None
    assert report.proof.share == 1.0
    A, B = (held[f"{PREFIX}lm_head.lora_{part}.weight"].double() for part in "AB")
    assert torch.allclose(tensors(tmp_path / "out")[HEAD], left.double() + 1.5 * B @ A, rtol=0, atol=2.0**-48)


def test_a_weight_that_is_tied_to_nothing(tmp_path: Path, base: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    edit_tensors(adapter, lambda held: {name: tensor + ("lm_head" in name) for name, tensor in held.items()})
    refused(base, [adapter], AdapterError, "lm_head.weight' is not part of a LoRA pair", "tied to nothing that it names")

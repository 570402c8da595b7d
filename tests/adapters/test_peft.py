"""Adapters that PEFT itself makes: merged to the bits of the oracle, and to a model that answers as the unmerged one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lorafold
import models
from models import different, expected, peft_edits, peft_model, save_adapter, save_base, tensors

LLAMA, CLASSIFIER, GPT2 = "LlamaForCausalLM", "LlamaForSequenceClassification", "GPT2LMHeadModel"


def case(kind: str = LLAMA, biased: bool = False, targets: Any = ("q_proj", "v_proj"), **config: Any) -> Any:
    targets = targets if isinstance(targets, str) else list(targets)
    return kind, {"bias": True} if biased else {}, {"target_modules": targets, **config}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": case(),
    "all_linear": case(targets="all-linear"),
    "rslora": case(use_rslora=True, r=5),
    "rank_pattern": case(rank_pattern={"v_proj": 2, "layers.0.self_attn.q_proj": 7}),
    "alpha_pattern": case(alpha_pattern={"layers.1.self_attn.q_proj": 1, "q_proj": 9, ".*proj": 3}),
    "both_patterns": case(
        targets="all-linear", rank_pattern={"mlp.*": 3}, alpha_pattern={"^model.layers.0.*": 2.5}, use_rslora=True
    ),
    "regex_target": case(targets=r".*\.1\..*(up|down)_proj"),
    "layers_to_transform": case(layers_to_transform=[1]),
    "bias_all": case(biased=True, bias="all"),
    "bias_lora_only": case(biased=True, bias="lora_only"),
    "lora_bias": case(biased=True, lora_bias=True),
    "lora_bias_and_bias": case(biased=True, lora_bias=True, bias="lora_only"),
    "score": case(CLASSIFIER, task_type="SEQ_CLS"),
    "lm_head_saved": case(modules_to_save=["lm_head"]),
    "embedding_saved": case(modules_to_save=["embed_tokens"]),
    "both_saved": case(modules_to_save=["embed_tokens", "lm_head"]),
    "norms_saved": case(modules_to_save=["input_layernorm"]),
    "saved_by_the_end_of_its_name": case(modules_to_save=["head"]),
    "embedding": case(targets=["embed_tokens", "q_proj"]),
    "lm_head": case(targets=["lm_head", "q_proj"]),
    "embedding_and_head": case(targets=["lm_head", "embed_tokens"]),
    "rank_above_the_weight": case(targets=["k_proj"], r=40),
    "gpt2": case(GPT2, targets=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "gpt2_flag_forgotten": case(GPT2, targets=["c_proj"]),
    "gpt2_bias_all": case(GPT2, targets=["c_attn"], bias="all", fan_in_fan_out=True),
}  # fmt: skip


def build(kind: str, options: dict[str, Any]) -> Any:
    return models.gpt2(**options) if kind.startswith("GPT2") else models.llama(kind, **options)


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        return model(input_ids=tokens).logits.double()


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize("case", CASES)
def test_bits_of_the_oracle_and_logits_of_the_unmerged_model(tmp_path: Path, case: str) -> None:
    kind, options, config = CASES[case]
    base = save_base(build(kind, options), tmp_path / "base")
    adapter = save_adapter(getattr(transformers, kind).from_pretrained(base, dtype=torch.float32), tmp_path / "adapter", **config)
    unmerged = peft_model(base, adapter, kind)
    wanted = expected(tensors(base), *peft_edits(unmerged))
    assert different(wanted, tensors(base))

    report = lorafold.merge(base, [adapter], tmp_path / "merged")
    assert different(tensors(tmp_path / "merged"), wanted) == {}
    assert report.proof is not None
    assert report.proof.share == 1
    assert lorafold.verify(tmp_path / "merged", base, [adapter]).failures == ()

    # the merged weights are float64: what is left is the order of additions in a model of two layers
    lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F64")
    loaded = getattr(transformers, kind).from_pretrained(tmp_path / "wide")
    assert loaded.dtype == torch.float64
    found, right = logits(loaded), logits(peft_model(base, adapter, kind, torch.float64))
    assert (found - right).norm() / right.norm() < 1e-10

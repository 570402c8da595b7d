"""Tied embeddings: the written model answers as the unmerged one does, tied where it can be, and says so where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorafold
import models
from lorafold.errors import ShapeMismatchError
from models import edit_json, peft_model, rewritten, save_adapter, save_base, tensors

LLAMA = "LlamaForCausalLM"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(models.llama(tied=True), tmp_path_factory.mktemp("tied") / "base", max_shard_size="1GB")


def trained(base: Path, path: Path, **config: Any) -> Path:
    return save_adapter(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path, **config)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 25).view(2, 12)).logits


def check(base: Path, adapter: Path, out: Path, *, tied: bool, kind: str = LLAMA) -> lorafold.MergeReport:
    """Merge, prove, and compare with the unmerged model in float64; whether the tie is kept, in files and config."""
    report = lorafold.merge(base, [adapter], out, dtype="F64")
    assert lorafold.verify(out, base, [adapter]).failures == ()
    loaded = getattr(transformers, kind).from_pretrained(out)
    found, right = logits(loaded), logits(peft_model(base, adapter, kind, torch.float64))
    assert found.dtype == torch.float64
    assert (found - right).norm() / right.norm() < 1e-10
    assert (HEAD in tensors(out)) is not tied
    assert config_of(out).get("tie_word_embeddings") is (bool(tied))
    assert any("tied" in note for note in report.plan.notes) or tied
    shared = loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert shared is tied
    return report


def test_untouched_ends_stay_tied(base: Path, tmp_path: Path) -> None:
    check(base, trained(base, tmp_path / "a", target_modules=["q_proj"]), tmp_path / "out", tied=True)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_an_update_on_one_end_unties(base: Path, tmp_path: Path, end: str) -> None:
    adapter = trained(base, tmp_path / "a", target_modules=[end])
    report = check(base, adapter, tmp_path / "out", tied=False)
    assert "alone changes" in "".join(report.plan.notes)


def test_different_updates_on_both_ends_untie(base: Path, tmp_path: Path) -> None:
    report = check(base, trained(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head"]), tmp_path / "out", tied=False)
    assert "get different updates" in "".join(report.plan.notes)


def same_on_both(adapter: Path, path: Path) -> Path:
    """The adapter with the head's factors made the transposes of the embedding's: the same ΔW."""
    rewritten(adapter, path)
    file = path / "adapter_model.safetensors"
    held = load_file(file)
    prefix = "base_model.model."
    embedding = f"{prefix}model.embed_tokens.lora_embedding"
    held[f"{prefix}lm_head.lora_A.weight"] = held[f"{embedding}_B"].T.contiguous()
    held[f"{prefix}lm_head.lora_B.weight"] = held[f"{embedding}_A"].T.contiguous()
    save_file(held, file)
    return path


def test_the_same_update_on_both_ends_keeps_the_tie(base: Path, tmp_path: Path) -> None:
    adapter = same_on_both(trained(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head"]), tmp_path / "same")
    report = check(base, adapter, tmp_path / "out", tied=True)
    assert "merged once" in "".join(report.plan.notes)
    assert sum(step.action == "merge" for step in report.plan.steps) == 1


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_a_replacement_of_one_end_unties(base: Path, tmp_path: Path, end: str) -> None:
    check(base, trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=[end]), tmp_path / "out", tied=False)


def test_replacements_of_both_ends(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    held = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model."
    names = [prefix + EMBEDDING, prefix + HEAD]
    assert all(name in held for name in names)
    equal = torch.equal(*(held[name] for name in names))
    check(base, adapter, tmp_path / "out", tied=equal)
    held[names[1]] = held[names[0]].clone() if not equal else held[names[0]] + 1
    other = rewritten(adapter, tmp_path / "b")
    save_file(held, other / "adapter_model.safetensors")
    check(base, other, tmp_path / "out2", tied=not equal)


def test_a_resized_vocabulary(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    torch.manual_seed(3)
    more = {n: torch.cat([t, torch.randn(5, models.HIDDEN)]) if n.endswith((EMBEDDING, HEAD)) else t for n, t in held.items()}
    save_file(more, file)
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 53
    assert "53 rows" in "".join(report.plan.notes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in ((EMBEDDING, loaded.get_input_embeddings().weight), (HEAD, loaded.get_output_embeddings().weight)):
        assert torch.equal(parameter, more["base_model.model." + name].bfloat16())

    save_file({n: held[n] if n.endswith(HEAD) else t for n, t in more.items()}, file)
    with pytest.raises(ShapeMismatchError, match=r"embed_tokens.weight would have 53 rows, lm_head.weight would have 48 rows"):
        lorafold.plan(base, [adapter])


def test_lora_on_a_resized_embedding(tmp_path: Path) -> None:
    """PEFT saves the resized embedding beside the pair: the update goes onto that one."""
    base = save_base(models.llama(), tmp_path / "base", max_shard_size="1GB")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(53)
    adapter = save_adapter(model, tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    lorafold.merge(base, [adapter], tmp_path / "out", dtype="F64")
    held = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens."
    delta = (held[f"{prefix}lora_embedding_B"].double() @ held[f"{prefix}lora_embedding_A"].double()).T * (6 / 4)
    wanted = held[f"{prefix}base_layer.weight"].double() + delta
    assert torch.allclose(tensors(tmp_path / "out")[EMBEDDING], wanted, rtol=0, atol=1e-14)
    assert tensors(tmp_path / "out")[HEAD].shape == (53, models.HIDDEN)
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()


def test_both_ends_stored_and_called_tied(tmp_path: Path) -> None:
    base = save_base(models.llama(tied=True), tmp_path / "base", max_shard_size="1GB")
    file = base / "model.safetensors"
    held = load_file(file)
    save_file(held | {HEAD: held[EMBEDDING].clone()}, file, metadata={"format": "pt"})
    adapter = trained(base, tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    check(base, adapter, tmp_path / "out", tied=False)
    report = lorafold.merge(base, [same_on_both(adapter, tmp_path / "same")], tmp_path / "same_out")
    written = tensors(tmp_path / "same_out")
    assert torch.equal(written[HEAD], written[EMBEDDING])
    assert config_of(tmp_path / "same_out")["tie_word_embeddings"] is True
    assert report.plan.count("merge") == 2


def test_gpt2_whose_configuration_leaves_the_tie_unsaid(tmp_path: Path) -> None:
    base = save_base(models.gpt2(), tmp_path / "base", max_shard_size="1GB")
    config = config_of(base)
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    adapter = trained(base, tmp_path / "a", target_modules=["wte"])
    check(base, adapter, tmp_path / "out", tied=False, kind="GPT2LMHeadModel")


def test_a_classifier_gets_no_head(tmp_path: Path) -> None:
    """Families that tie by default say so in the configuration of their classifiers too, which have no head."""
    base = save_base(models.llama("LlamaForSequenceClassification"), tmp_path / "base", max_shard_size="1GB")
    edit_json(base / "config.json", tie_word_embeddings=True)
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    adapter = save_adapter(model, tmp_path / "a", target_modules=["embed_tokens"], task_type="SEQ_CLS")
    plan = lorafold.plan(base, [adapter])
    assert {step.tensor for step in plan.steps} == set(tensors(base))
    assert "tie_word_embeddings" not in plan.config

"""Adapters on the head over the vocabulary, where it shares its numbers with the embedding, and on the embedding alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lorafold
from architectures.zoo import ARCHITECTURES, adapted, built, outputs, plainly, relative, saved
from models import different, tensors

HEADS = {
    "gemma3": "lm_head", "gpt2": "lm_head", "whisper": "proj_out", "t5": "lm_head", "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder", "gpt_neox": "lm_head", "phi3": "lm_head", "llava": "lm_head", "qwen2_vl": "lm_head",
}  # fmt: skip
EMBEDDINGS = {
    "gemma3": "embed_tokens", "gpt2": "wte", "whisper": "embed_tokens", "bert": "word_embeddings", "gpt_neox": "embed_in",
    "llama": "embed_tokens", "llava": "embed_tokens",
}  # fmt: skip


@pytest.mark.parametrize(("name", "module"), [*HEADS.items(), *EMBEDDINGS.items()])
def test_one_end_of_the_vocabulary(tmp_path: Path, name: str, module: str) -> None:
    """PEFT leaves the other end at the base's numbers; where the two were tied, they are no more."""
    architecture = replace(ARCHITECTURES[name], targets=[module])
    model = built(architecture)
    before = outputs(model, architecture)
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, architecture)
    saved(wrapped, tmp_path / "adapter")
    wanted = outputs(wrapped, architecture)
    assert relative(before, wanted) > 0.01
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = plainly(type(model).from_pretrained(tmp_path / "out", dtype=torch.float64))
    assert relative(outputs(merged, architecture), wanted) < 1e-6  # as in test_architectures


def test_a_bias_that_was_tied_with_the_head(tmp_path: Path) -> None:
    """BERT's flag ties both; the base comes back without either."""
    architecture = replace(ARCHITECTURES["bert"], targets=["cls.predictions.decoder"])
    model = built(architecture)
    model.save_pretrained(tmp_path / "base")
    saved(adapted(model, architecture), tmp_path / "adapter")
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert after.keys() - before.keys() == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert torch.equal(after["cls.predictions.decoder.bias"], before["cls.predictions.bias"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    lorafold.unmerge(tmp_path / "out", tmp_path / "restored", base=tmp_path / "base")
    assert different(tensors(tmp_path / "restored"), before) == {}

"""layer_replication: the longer model that PEFT trained, written out, with a weight of its own for every layer."""

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
from lorafold import LowRankUpdate
from lorafold.errors import CheckpointError, PlanError, ShapeMismatchError, UnsupportedAdapterError
from models import different, edit_json, edit_tensors, expected, peft_edits, peft_model, refused, save_adapter, save_base, tensors
from oracle import correctly_rounded

LLAMA = "LlamaForCausalLM"
RANGES, CHOSEN = [(0, 2), (1, 3)], [0, 1, 1, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(models.llama(layers=3), tmp_path_factory.mktemp("layers") / "base")


def trained(base: Path, path: Path, **config: Any) -> Path:
    model = getattr(transformers, LLAMA).from_pretrained(base, dtype=torch.float32)
    return save_adapter(model, path, **{"target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES, **config})


def longer(base: Path) -> dict[str, torch.Tensor]:
    """The tensors of the model with the chosen layers."""
    found = {}
    for name, tensor in tensors(base).items():
        head, _, rest = name.partition("model.layers.")
        if head or not rest:
            found[name] = tensor
            continue
        number, _, rest = rest.partition(".")
        found |= {f"model.layers.{i}.{rest}": tensor for i, each in enumerate(CHOSEN) if each == int(number)}
    return found


def test_copies_of_a_layer_that_are_large_enough_for_compiled_code(tmp_path: Path) -> None:
    """Blocks of a mebibyte or more of both copies, which start from the same rows, go from file to file together."""
    torch.manual_seed(3)
    weights = {f"model.layers.{i}.mlp.down_proj.weight": torch.randn(1024, 600).bfloat16() for i in range(2)}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    pairs = [LowRankUpdate(torch.randn(4, 600) / 8, torch.randn(1024, 4) / 8, 1.0) for _ in range(3)]
    held = {f"base_model.model.model.layers.{i}.mlp.down_proj.lora_A.weight": pair.lora_A for i, pair in enumerate(pairs)}
    held |= {f"base_model.model.model.layers.{i}.mlp.down_proj.lora_B.weight": pair.lora_B for i, pair in enumerate(pairs)}
    (tmp_path / "adapter").mkdir()
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["down_proj"], "layer_replication": [[0, 2], [0, 1]]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = tensors(tmp_path / "out")
    for i, (origin, pair) in enumerate(zip((0, 1, 0), pairs, strict=True)):
        weight = weights[f"model.layers.{origin}.mlp.down_proj.weight"]
        wanted = torch.from_numpy(correctly_rounded(weight, [pair], torch.bfloat16)).bfloat16()
        assert torch.equal(merged[f"model.layers.{i}.mlp.down_proj.weight"], wanted), i


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["norm"], "rank_pattern": {"layers.2.mlp.*": 2}}])
def test_every_layer_has_its_own_weight(tmp_path: Path, base: Path, config: dict[str, Any]) -> None:
    """PEFT's own merge adds the updates of all copies of a layer to the one weight that they share (huggingface/peft#1707)."""
    adapter = trained(base, tmp_path / "adapter", **config)
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert merged.keys() == longer(base).keys()
    if not config.get("use_dora"):
        wanted = expected(longer(base), *peft_edits(peft_model(base, adapter, LLAMA)))
        assert different(merged, wanted) == {}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    assert any("the model has 4 layers, made of the base's 3 (layer_replication): 0, 1, 1, 2" in note for note in report.plan.notes)
    assert report.proof is not None
    assert report.proof.share == 1.0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == merged.keys()
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index.items())
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()

    lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F64")
    model = getattr(transformers, LLAMA).from_pretrained(tmp_path / "wide")
    tokens = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        right = peft_model(base, adapter, LLAMA, torch.float64)(input_ids=tokens).logits
    assert found.dtype == torch.float64
    assert (found - right).norm() / right.norm() < 1e-12


def test_what_cannot_be_put_together(tmp_path: Path, base: Path) -> None:
    plain = trained(base, tmp_path / "plain", layer_replication=None, seed=3)
    adapter = trained(base, tmp_path / "adapter")
    with pytest.raises(PlanError, match=r"are for models of different layers: layer_replication is \[\], \[\[0, 2\], \[1, 3\]\]"):
        lorafold.plan(base, [adapter, plain])
    with pytest.raises(PlanError, match="under this name, since the adapter is for a model of other layers"):
        lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    assert not (tmp_path / "out").exists()
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 4]])
    refused(base, [adapter], ShapeMismatchError, "layer_replication asks for layer 3, but", "has 3 layers")
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 3]])
    other = models.copied(base, tmp_path / "other")
    edit_json(other / "config.json", num_hidden_layers=2)
    refused(other, [adapter], CheckpointError, "has 3 layers, but num_hidden_layers of its config.json is 2")
    edit_json(other / "config.json", num_hidden_layers=3, decoder_sparse_step=2)
    refused(other, [adapter], UnsupportedAdapterError, "decoder_sparse_step of its config.json is 2")


def test_kinds_of_layers_follow(tmp_path: Path, base: Path) -> None:
    adapter = trained(base, tmp_path / "adapter")
    other = models.copied(base, tmp_path / "other")
    edit_json(other / "config.json", layer_types=["a", "b", "c"], mlp_only_layers=[1])
    fields = lorafold.plan(other, [adapter]).config
    assert fields == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"], "mlp_only_layers": [1, 2]}


def test_layers_in_two_places_are_refused(tmp_path: Path, base: Path) -> None:
    adapter = trained(base, tmp_path / "adapter")
    other = save_base(models.llama(layers=3), tmp_path / "other", max_shard_size="1GB")
    edit_tensors(other, lambda held: held | {"h.0.weight": torch.ones(2, 2)})
    refused(other, [adapter], CheckpointError, "has layers at h, model.layers")

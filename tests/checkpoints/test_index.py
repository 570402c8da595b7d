"""The index that is written: what transformers reads, and would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorafold.checkpoints.index import INDEX_NAME, is_plain_name, read_index, write_index
from lorafold.checkpoints.open import open_checkpoint
from lorafold.errors import OutputError


def test_writes_as_transformers_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16))
    model.save_pretrained(tmp_path / "model", max_shard_size="5KB")
    written = (tmp_path / "model" / INDEX_NAME).read_text()
    checkpoint = open_checkpoint(tmp_path / "model")
    expected = json.loads(written)
    expected["metadata"] = {"total_size": checkpoint.nbytes}
    path = write_index(tmp_path, dict(reversed(checkpoint.weight_map.items())), checkpoint.nbytes)
    assert path.read_text() == json.dumps(expected, indent=2, sort_keys=True) + "\n"
    assert json.loads(written)["metadata"]["total_size"] == checkpoint.nbytes
    # and transformers loads by it
    path.replace(tmp_path / "model" / INDEX_NAME)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_reads_what_it_writes_and_overwrites_nothing(tmp_path: Path) -> None:
    write_index(tmp_path, {"b": "m-2.safetensors", "a": "m-1.safetensors"}, 7)
    index = read_index(tmp_path / INDEX_NAME)
    assert index.weight_map == {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    assert index.metadata == {"total_size": 7}
    assert index.shard_names == ("m-1.safetensors", "m-2.safetensors")
    with pytest.raises(OutputError, match="File exists"):
        write_index(tmp_path, {}, 0)


def test_plain_names() -> None:
    assert is_plain_name("模型 1.safetensors")
    assert not is_plain_name("model\x7f.safetensors")

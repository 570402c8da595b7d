"""Row 64: a flipped bit. The format has no checksum; hashes that come from elsewhere find it, of inputs and of what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorafold import open_checkpoint
from lorafold.engine.hashes import tensor_hashes
from lorafold.files.safetensors.header import read_header
from models import edit_json

SHARD, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q0 = "model.layers.0.q_proj.weight"


def flipped(file: Path, place: int = -1) -> bytes:
    """Flip a bit of `file`; what it was before."""
    whole = file.read_bytes()
    data = bytearray(whole)
    data[place] ^= 1
    file.write_bytes(data)
    return whole


def test_row_64_in_the_adapter(road: Any) -> None:
    file = road.adapter / "adapter_model.safetensors"
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    expect = ("--expect-sha256", f"adapter_model.safetensors={good}")
    road.merge(*expect)
    flipped(file)
    road.refused("adapter_model.safetensors", f"expected sha256 {good}", "found", options=(*expect, "--overwrite"))
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 3


@pytest.mark.parametrize("hashed", [False, True])
def test_row_64_any_bit_of_the_output_is_found_and_with_hashes_of_tensors_named(road: Any, hashed: bool) -> None:
    road.merge(*(("--hash-tensors",) if hashed else ()))
    receipt = road.receipt()
    names = load_file(road.out / SHARD).keys() | load_file(road.out / SECOND).keys()
    assert receipt["tensor_hashes"].keys() == (names if hashed else set())
    file = road.out / SHARD
    info = read_header(file).tensors[Q0]
    for place in (info.start, info.stop - 1):
        whole = flipped(file, place)
        code, out, err = road.run("verify", road.out)
        assert code == 3
        assert SHARD in out + err
        assert (f"{Q0} has sha256" in out + err) is hashed
        found = json.loads(road.run("verify", road.out, "--json")[1])["tensors"]
        wrong = {name for name, each in found.items() if not each["proven"]}
        assert wrong == ({Q0} if hashed else load_file(file).keys())
        file.write_bytes(whole)
    assert road.run("verify", road.out)[0] == 0


def test_row_64_in_the_receipt_itself(road: Any) -> None:
    road.merge("--hash-tensors")
    hashes = road.receipt()["files"]
    edit_json(road.out / "lorafold.json", files={**hashes, SHARD: "0" * 64})
    code, out, err = road.run("verify", road.out)
    assert code == 3
    assert f"expected {'0' * 64}" in out + err


def test_hashes_of_tensors_are_those_of_their_bytes(road: Any) -> None:
    seen: list[int] = []
    checkpoint = open_checkpoint(road.base)
    found = tensor_hashes(checkpoint.shards, threads=3, on_bytes=seen.append)
    assert sum(seen) == checkpoint.nbytes
    for name, info in checkpoint.tensors.items():
        assert found[name] == hashlib.sha256(info.path.read_bytes()[info.start : info.stop]).hexdigest()

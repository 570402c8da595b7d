"""verify finds whatever is not as it must be: any bit of any file, extra and missing tensors, other inputs, an edited receipt."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import VerificationError
from models import copied, edit_json, plain_adapter, plain_base, tensors

CHECKED = (
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json",
    "tokenizer.json", "generation_config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """OUT, BASE and ADAPTER."""
    folder = tmp_path_factory.mktemp("merged")
    base, adapter = plain_base(folder / "base"), plain_adapter(folder / "adapter")
    (base / "tokenizer.json").write_text('{"model": "x"}\n')
    (base / "generation_config.json").write_text("{}\n")
    lorafold.merge(base, [adapter], folder / "out")
    assert lorafold.verify(folder / "out", base, [adapter]).failures == ()
    return folder / "out", base, adapter


@pytest.fixture
def out(tmp_path: Path, merged: tuple[Path, Path, Path]) -> Path:
    return copied(merged[0], tmp_path / "out")


def failures(out: Path, merged: tuple[Path, Path, Path], **other: Any) -> tuple[str, ...]:
    """What verify finds, whether it returns it or cannot read the output at all."""
    base, adapters = other.get("base", merged[1]), other.get("adapters", [merged[2]])
    try:
        return lorafold.verify(out, base, adapters).failures
    except VerificationError as error:
        return (error.message,)


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bit_of_any_file(out: Path, merged: tuple[Path, Path, Path], data: st.DataObject) -> None:
    file = out / data.draw(st.sampled_from(CHECKED))
    content = file.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)
    try:
        assert failures(out, merged), f"bit {bit} of {file.name}"
    finally:
        file.write_bytes(content)


def elements(out: Path) -> Iterator[tuple[Path, str, int]]:
    for file in sorted(out.glob("*.safetensors")):
        header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        for name, entry in header.items():
            if name != "__metadata__":
                for offset in range(*entry["data_offsets"]):
                    yield file, name, start + offset


def test_a_bit_of_a_tensor_is_reported_by_name_and_index(out: Path, merged: tuple[Path, Path, Path]) -> None:
    places = list(elements(out))
    for file, name, offset in random.Random(0).sample(places, 25):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[offset] ^= 0x10
        file.write_bytes(flipped)
        found = lorafold.verify(out, merged[1], [merged[2]])
        file.write_bytes(content)
        first = min(each for _, other, each in places if other == name)
        shape = list(tensors(merged[1])[name].shape)
        element = (offset - first) // 2
        index = [element // 8, element % 8] if len(shape) == 2 else [element]
        assert any(f.startswith(f"{name} differs in 1 of") and f.endswith(f"the first at {index}") for f in found.failures)
        assert any("sha256" in f and file.name in f for f in found.failures)
        assert found.tensors[name].proven is False
        assert sum(not tensor.proven for tensor in found.tensors.values()) == 1


def test_tensors_that_are_missing_extra_or_of_another_form(out: Path, merged: tuple[Path, Path, Path]) -> None:
    shard, index = out / "model-00002-of-00002.safetensors", out / "model.safetensors.index.json"
    held, listed = load_file(shard), json.loads(index.read_text())
    name = "model.layers.1.q_proj.weight"
    for change, part in (
        ({n: t for n, t in held.items() if n != name}, f"{name} is missing"),
        (held | {"extra": torch.ones(2)}, "extra is not in the plan"),
        (held | {name: held[name].float()}, f"{name} is [8, 8] of F32, expected [8, 8] of BF16"),
        (held | {name: held[name].reshape(4, 16)}, f"{name} is [4, 16] of BF16, expected [8, 8] of BF16"),
    ):
        save_file(change, shard, metadata={"format": "pt"})
        weight_map = {n: file for n, file in listed["weight_map"].items() if file != shard.name} | dict.fromkeys(change, shard.name)
        index.write_text(json.dumps(listed | {"weight_map": weight_map}))
        assert any(part in failure for failure in failures(out, merged)), part


def test_files_that_are_missing_or_extra(out: Path, merged: tuple[Path, Path, Path]) -> None:
    (out / "tokenizer.json").unlink()
    (out / "generation_config.json").write_text('{"x": 1}')
    (out / "pytorch_model.bin").write_bytes(b"x")
    found = "\n".join(failures(out, merged))
    assert "tokenizer.json is missing" in found
    assert "generation_config.json differs from" in found
    assert "pytorch_model.bin is not part of the checkpoint" in found
    (out / "config.json").unlink()
    assert "config.json is missing" in "\n".join(failures(out, merged))
    (out / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors is missing" in failures(out, merged)[0]


def test_fields_of_the_configuration(out: Path, merged: tuple[Path, Path, Path]) -> None:
    edit_json(out / "config.json", hidden_size=8.0, more=True)
    assert failures(out, merged) == ("config.json differs from what it must be in hidden_size, more",)


def test_what_people_may_change(out: Path, merged: tuple[Path, Path, Path]) -> None:
    (out / "README.md").write_text("# My model\n")
    (out / "notes.txt").write_text("x")
    moved = out.rename(out.with_name("renamed"))
    assert failures(moved, merged) == ()


def test_other_inputs_than_it_was_made_of(tmp_path: Path, merged: tuple[Path, Path, Path]) -> None:
    out, base, adapter = merged
    other = copied(base, tmp_path / "base")
    held = load_file(other / "model-00001-of-00002.safetensors")
    held["model.layers.0.norm.weight"][3] += 1
    save_file(held, other / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    found = failures(out, merged, base=other)
    assert found == (f"model.layers.0.norm.weight differs in 1 of 8 elements of a block, the first at {[3]}",)
    retrained = plain_adapter(tmp_path / "adapter", seed=8)
    for adapters in ([retrained], [(adapter, 0.5)], [adapter, retrained], [(adapter, 1.0000001)]):
        found = failures(out, merged, adapters=adapters)
        assert any("lorafold.json: it does not list the adapter" in failure for failure in found)
    assert sum("q_proj.weight differs" in failure for failure in failures(out, merged, adapters=[retrained])) == 2


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda r: r["adapters"].clear(), "it does not list the adapter adapter at weight 1"),
        (lambda r: r["adapters"].append(r["adapters"][0] | {"sha256": "0" * 64}), "it lists the adapter adapter"),
        (lambda r: r["adapters"][0].update(adapter_weight=2.0), "it does not list the adapter adapter at weight 1"),
        (lambda r: r["base"].update(fingerprint="0"), "its fingerprint is of a base with other files or tensors"),
        (lambda r: r["tensors"].pop("model.layers.0.q_proj.weight"), "what it says of model.layers.0.q_proj.weight"),
        (lambda r: r["tensors"]["model.layers.0.q_proj.weight"]["updates"][0].update(scaling=2.5), "model.layers.0.q_proj.weight"),
        (lambda r: r["tensors"]["model.layers.0.v_proj.weight"].update(kept=0.5), "what it says of model.layers.0.v_proj.weight"),
        (lambda r: r["tensors"].update(x={"action": "merge"}), "what it says of x"),
        (lambda r: r.update(kept=0.5), "kept is 0.5, measured 0.99"),
        (lambda r: r["files"].update({"model-00001-of-00002.safetensors": "0" * 64}), "its sha256 of model-00001-of-00002"),
        (lambda r: r["files"].pop("model-00001-of-00002.safetensors"), "its sha256 of model-00001-of-00002.safetensors"),
        (lambda r: r.update(rounding="stochastic"), "model.layers.0.q_proj.weight differs"),
        (lambda r: r.update(dtype="F32"), "is [8, 8] of BF16, expected [8, 8] of F32"),
        (lambda r: r.update(precision="double"), "precision must be 'exact' or 'fast', not 'double'"),
        (lambda r: r.update(seed=True), "seed must be an integer, not True"),
        (lambda r: r.update(format=2), "a receipt of format 1 is expected, found 2"),
        (lambda r: r.update(surprise=1), "is not a receipt"),
        (lambda r: r.pop("tensors"), "is not a receipt"),
        (lambda r: r["adapters"][0].update(adapter_weight="1"), "an adapter must have a name, a sha256 and a weight"),
    ],
)  # fmt: skip
def test_an_edited_receipt(out: Path, merged: tuple[Path, Path, Path], edit: Any, part: str) -> None:
    receipt = json.loads((out / "lorafold.json").read_text())
    edit(receipt)
    (out / "lorafold.json").write_text(json.dumps(receipt))
    found = failures(out, merged)
    assert any(part in failure for failure in found), found


def test_no_receipt(out: Path, merged: tuple[Path, Path, Path]) -> None:
    (out / "lorafold.json").unlink()
    assert "has no lorafold.json: how it was rounded is not known" in failures(out, merged)[0]


def test_the_error_lists_what_failed(out: Path, merged: tuple[Path, Path, Path]) -> None:
    edit_json(out / "config.json", hidden_size=9)
    proof = lorafold.verify(out, merged[1], [merged[2]])
    with pytest.raises(VerificationError, match="say it must be, in one place:") as caught:
        proof.raise_for_failures()
    assert caught.value.failures == proof.failures
    assert caught.value.exit_code == 3
    assert proof.to_json()["proven"] is False

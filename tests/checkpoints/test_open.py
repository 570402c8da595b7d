"""Checkpoints of every layout open to the same tensors; every contradiction between index, shards and folder is an error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafold.checkpoints.open import open_checkpoint
from lorafold.errors import CheckpointError
from lorafold.files.safetensors.reader import TensorFile

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, saved by transformers in shards (sharded/) and in one file (single/)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "sharded", max_shard_size="3KB")
    model.save_pretrained(root / "single")
    return root


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two shards and their index."""
    root = tmp_path / "base"
    root.mkdir()
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, root / ONE)
    save_file({"c": torch.ones(4)}, root / TWO)
    write_index(root, {"a": ONE, "b": ONE, "c": TWO})
    (root / "config.json").write_text('{"model_type": "llama"}')
    return root


def write_index(root: Path, weight_map: Any, **more: Any) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map} | more))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    return str(caught.value)


def test_shards_and_one_file_of_a_real_model_hold_the_same(saved: Path) -> None:
    sharded, single = open_checkpoint(saved / "sharded"), open_checkpoint(saved / "single")
    assert (sharded.indexed, single.indexed) == (True, False)
    assert len(sharded.shards) > 2
    assert len(single.shards) == 1
    expected = load_file(saved / "single" / "model.safetensors")
    for checkpoint in (sharded, single):
        assert checkpoint.tensors.keys() == expected.keys()
        assert checkpoint.nbytes == sum(t.nbytes for t in expected.values())
        assert checkpoint.config is not None
        assert checkpoint.config["model_type"] == "llama"
        assert [name for shard in checkpoint.shards for name in shard.header.tensors] == list(checkpoint.tensors)
        for shard in checkpoint.shards:
            with TensorFile(shard.header) as file:
                for name, info in shard.header.tensors.items():
                    assert torch.equal(file.read(info), expected[name])
    index = json.loads((saved / "sharded" / INDEX).read_text())
    assert sharded.index_metadata == index["metadata"]
    assert sharded.weight_map == index["weight_map"]


def test_one_file_by_its_own_path(saved: Path) -> None:
    checkpoint = open_checkpoint(saved / "single" / "model.safetensors")
    assert checkpoint.single_file
    assert checkpoint.root == saved / "single"
    assert checkpoint.tensors == open_checkpoint(saved / "single").tensors
    assert not open_checkpoint(saved / "single").single_file


def test_a_file_of_any_name_when_it_is_the_only_one(base: Path) -> None:
    root = base.parent / "unet"
    root.mkdir()
    shutil.copy(base / ONE, root / "diffusion_pytorch_model.safetensors")
    assert list(open_checkpoint(root).tensors) == ["a", "b"]
    shutil.copy(base / TWO, root / "other.safetensors")
    assert "holds 2 .safetensors files and no index" in refusal(root)
    shutil.copy(base / TWO, root / "model.safetensors")
    assert list(open_checkpoint(root).tensors) == ["c"]


def test_an_index_of_another_stem(base: Path) -> None:
    (base / INDEX).rename(base / "diffusion_pytorch_model.safetensors.index.json")
    assert open_checkpoint(base).indexed
    (base / "x.safetensors.index.json").write_text("{}")
    assert "several indexes: diffusion_pytorch_model.safetensors.index.json, x.safetensors.index.json" in refusal(base)
    write_index(base, {"a": ONE, "b": ONE, "c": TWO})
    assert list(open_checkpoint(base).tensors) == ["a", "b", "c"]


def test_a_file_that_no_index_lists_is_not_part_of_it(base: Path) -> None:
    save_file({"x": torch.zeros(1)}, base / "consolidated.safetensors")
    assert list(open_checkpoint(base).tensors) == ["a", "b", "c"]


# What is there instead


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-135M").mkdir()
    assert f"did you mean {tmp_path / 'SmolLM2-135M'}?" in refusal(tmp_path / "SmolLM-135M")
    assert "models are not downloaded" in refusal(Path("some-org/some-model"))
    (tmp_path / "link").symlink_to("nowhere")
    assert "is a symbolic link to nothing" in refusal(tmp_path / "link")
    assert "no such folder" in refusal(Path("a\0b"))
    assert "File name too long" in refusal(Path("n" * 300))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "weights.pt", "model.ckpt", "tf_model.h5"])
def test_row_39_other_weight_formats_are_named_and_not_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # to open it would wait for ever
    message = refusal(tmp_path)
    assert f"no .safetensors file, only {name}" in message
    what = "give the path of the .gguf file" if name == "model.gguf" else "convert the weights to safetensors first"
    assert f"hint: {what}" in message
    assert "convert the weights" in refusal(tmp_path / name)


def test_a_folder_with_nothing_or_the_wrong_things(tmp_path: Path) -> None:
    assert "has no .safetensors file: it holds nothing" in refusal(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "it holds notes.txt" in refusal(tmp_path)
    assert "neither a folder nor a .safetensors file" in refusal(tmp_path / "notes.txt")
    (tmp_path / "checkpoint-10").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoint-10" / "model.safetensors")
    assert f"did you mean {tmp_path / 'checkpoint-10'}?" in refusal(tmp_path)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_given_as_a_base(tmp_path: Path, weights: str | None) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if weights:
        save_file({"a": torch.zeros(1)}, tmp_path / weights)
    assert "is an adapter, not a base checkpoint: it has adapter_config.json" in refusal(tmp_path)
    if weights == "adapter_model.safetensors":
        assert "is an adapter" in refusal(tmp_path / weights)


def test_row_63_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert "holds no tensors" in refusal(tmp_path)
    write_index(tmp_path, {})
    assert "lists no tensors" in refusal(tmp_path, prefer="index")


# Index against shards


def test_row_30_index_and_one_file_together(base: Path) -> None:
    save_file({"x": torch.zeros(1)}, base / "model.safetensors")
    message = refusal(base)
    assert f"holds two checkpoints: {INDEX} with its shards, and model.safetensors" in message
    assert list(open_checkpoint(base, prefer="index").tensors) == ["a", "b", "c"]
    assert list(open_checkpoint(base, prefer="single").tensors) == ["x"]
    (base / INDEX).write_text("broken")
    assert list(open_checkpoint(base, prefer="single").tensors) == ["x"]


def test_row_30_an_index_that_lists_the_one_file_is_no_second_checkpoint(base: Path) -> None:
    save_file({"x": torch.zeros(1)}, base / "model.safetensors")
    write_index(base, {"x": "model.safetensors"})
    assert list(open_checkpoint(base).tensors) == ["x"]


def test_row_23_a_missing_shard(base: Path) -> None:
    (base / ONE).unlink()
    message = refusal(base)
    assert f"{ONE} is missing: {INDEX} says that it holds 2 tensors" in message


@pytest.mark.parametrize("change", [lambda data: data[:-3], lambda data: data + b"xyz"])
def test_row_24_a_shard_of_another_length(base: Path, change: Callable[[bytes], bytes]) -> None:
    data = (base / TWO).read_bytes()
    (base / TWO).write_bytes(change(data))
    message = refusal(base)
    assert TWO in message
    assert f"expected {len(data)} bytes, found {len(change(data))}" in message


def test_row_27_a_tensor_that_is_in_no_shard(base: Path) -> None:
    write_index(base, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    assert f"lists 1 tensors that are not where it says: 'd' should be in {TWO} and is in no shard" in refusal(base)


def test_row_27_a_tensor_that_is_in_another_shard(base: Path) -> None:
    write_index(base, {"a": ONE, "b": TWO, "c": TWO})
    assert f"'b' should be in {TWO} and is in {ONE}" in refusal(base)


def test_row_28_a_tensor_that_the_index_does_not_list(base: Path) -> None:
    write_index(base, {"a": ONE, "c": TWO})
    message = refusal(base)
    assert f"does not list 1 tensors that its shards hold: 'b' (in {ONE})" in message


def test_row_29_a_tensor_in_two_shards(base: Path) -> None:
    save_file({"c": torch.ones(4), "b": torch.ones(3)}, base / TWO)
    assert f"the tensor 'b' is in two shards, {ONE} and {TWO}" in refusal(base)


def test_row_29_two_names_of_one_file(base: Path) -> None:
    (base / TWO).unlink()
    (base / TWO).symlink_to(ONE)
    assert "is in two shards" in refusal(base)


def test_row_31_names_twice_in_index_and_config(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "a", "model_type": "b"}')
    assert "config.json: the key 'model_type' stands twice" in refusal(base)
    (base / INDEX).write_text(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}')
    assert f"{INDEX}: the key 'a' stands twice" in refusal(base)


def test_a_config_may_say_infinity(base: Path) -> None:
    (base / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(base).config == {"time_step_limit": [0.0, float("inf")]}
    (base / "config.json").write_text("[1]")
    assert "config.json must hold a JSON object" in refusal(base)
    (base / "config.json").unlink()
    assert open_checkpoint(base).config is None


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "x.safetensors"}, "metadata": 3}', ""])
def test_indexes_of_another_form(base: Path, index: str) -> None:
    (base / INDEX).write_text(index)
    assert INDEX in refusal(base)


# What is not a file in the folder


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "C:x.safetensors", "a\0.safetensors", "..\\x.safetensors", "sub/x.safetensors",
     "a\n.safetensors", "..", "", "x.bin", ".safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_row_20_shard_names_that_are_not_plain_are_never_opened(base: Path, shard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def recording(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *args, **kwargs)

    write_index(base, {"a": ONE, "b": shard})
    monkeypatch.setattr(os, "open", recording)
    message = refusal(base)
    assert "the tensor 'b' is said to be in" in message
    assert {Path(path).name for path in opened} == {INDEX}


def test_row_21_a_hub_cache_snapshot(base: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / ("f" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        blob = f"{number:064x}" if path.suffix == ".safetensors" else f"{number:040x}"
        path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert [shard.name for shard in checkpoint.shards] == [ONE, TWO]
    assert [shard.sha256 for shard in checkpoint.shards] == [os.readlink(snapshot / name)[-64:] for name in (ONE, TWO)]
    assert list(open_checkpoint(snapshot / ONE).tensors) == ["a", "b"]
    # The folder may itself be reached by a link.
    (tmp_path / "latest").symlink_to(snapshot)
    assert list(open_checkpoint(tmp_path / "latest").tensors) == ["a", "b", "c"]
    # A subfolder of a snapshot lies deeper.
    (snapshot / "text_encoder").mkdir()
    (snapshot / "text_encoder" / "model.safetensors").symlink_to(Path("..", os.readlink(snapshot / TWO)))
    assert list(open_checkpoint(snapshot / "text_encoder").tensors) == ["c"]


@pytest.mark.parametrize(
    "target",
    ["../../blobs/README", "../../../models--org--other/blobs/" + "0" * 64, "/dev/zero", "../../outside.safetensors",
     "../../blobs/sub/" + "0" * 64],
)  # fmt: skip
def test_row_21_links_that_leave_are_refused(base: Path, tmp_path: Path, target: str) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "main"
    snapshot.parent.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    base.rename(snapshot)
    real = Path(os.path.normpath(snapshot / target))
    if not real.exists():
        real.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(snapshot / TWO, real)
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(target)
    message = refusal(snapshot)
    assert f"{TWO} is a symbolic link that leaves its folder: it leads to {real}" in message


def test_row_21_index_and_config_may_not_lead_elsewhere(base: Path, tmp_path: Path) -> None:
    for name in ("config.json", INDEX):
        (base / name).rename(tmp_path / name)
        (base / name).symlink_to(tmp_path / name)
        assert f"{name} is a symbolic link that leaves its folder" in refusal(base)


def test_a_link_within_the_folder_is_followed(base: Path) -> None:
    (base / "files").mkdir()
    (base / ONE).rename(base / "files" / "one")
    (base / ONE).symlink_to("files/one")
    assert list(open_checkpoint(base).tensors) == ["a", "b", "c"]


def test_row_22_a_shard_that_is_no_regular_file(base: Path) -> None:
    def loop() -> None:
        (base / TWO).symlink_to(TWO)

    makers: dict[str, Callable[[], None]] = {
        "is a named pipe": lambda: os.mkfifo(base / TWO),
        "is a folder": (base / TWO).mkdir,
        "cannot be followed": loop,
        "symbolic link to nothing": lambda: (base / TWO).symlink_to("none"),
    }
    for says, make in makers.items():
        if (base / TWO).is_dir():
            (base / TWO).rmdir()
        else:
            (base / TWO).unlink()
        make()
        message = refusal(base)
        assert TWO in message
        assert says in message


def test_row_51_a_base_that_may_only_be_read(base: Path) -> None:
    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    try:
        before = {path: path.stat().st_mtime_ns for path in (base, *base.iterdir())}
        open_checkpoint(base)
        assert {path: path.stat().st_mtime_ns for path in (base, *base.iterdir())} == before
    finally:
        base.chmod(0o755)


def test_row_37_names_from_the_folder_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m.bin").touch()
    assert "\x1b" not in refusal(tmp_path)


def test_row_62_spaces_other_scripts_and_long_paths(base: Path, tmp_path: Path) -> None:
    deep = tmp_path / "Zoë 模型" / ("d" * 200) / ("e" * 200)
    deep.parent.mkdir(parents=True)
    base.rename(deep)
    assert list(open_checkpoint(deep).tensors) == ["a", "b", "c"]

"""What the base's files say of themselves stays with the output, entry by entry, unless the merge makes it false; and is proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.planning.output_files import OF_LAYERS, OF_THE_BYTES, OF_THE_DTYPE
from models import plain_adapter, plain_base

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LAYER = "transformer_blocks.1.ff.net.2"
TO_Q = "transformer_blocks.0.attn1.to_q"


def remarks(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def remarked(base: Path, name: str, remark: dict[str, str] | None) -> None:
    save_file(load_file(base / name), base / name, metadata=remark)


@pytest.fixture
def road(tmp_path: Path) -> tuple[Path, Path]:
    return plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")


def comfy(path: Path, **more: str) -> dict[str, str]:
    """A single file as ComfyUI's templates load it: half its layers in float8, and where that is said."""
    base = {
        f"model.diffusion_model.{TO_Q}.weight": torch.randn(16, 16).bfloat16(),
        f"model.diffusion_model.{LAYER}.weight": torch.randn(16, 16).to(torch.float8_e4m3fn),
        f"model.diffusion_model.{LAYER}.weight_scale": torch.tensor(0.01),
        "vae.decoder.conv_in.weight": torch.ones(4, 4, 3, 3),
    }
    metadata = {
        "config": json.dumps({"transformer": {"num_layers": 2}, "vae": {"timestep_conditioning": True}}),
        OF_LAYERS: json.dumps({"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}}),
        "modelspec.title": "LTX",
        "modelspec.unet_dtype": "bf16,fp32",
        **more,
    }
    save_file(base, path, metadata=metadata)
    return metadata


def lora(path: Path) -> Path:
    held = {f"diffusion_model.{TO_Q}.lora_{side}.weight": torch.randn(*shape) for side, shape in (("A", (2, 16)), ("B", (16, 2)))}
    save_file(held, path)
    return path


@pytest.mark.parametrize("dtype", [None, "F32"])
def test_a_single_file_of_comfyui_stays_one(tmp_path: Path, dtype: str | None) -> None:
    """The layers in float8 are copied whatever the dtype, and what is said of them stays true."""
    said = comfy(tmp_path / "ltx.safetensors", dtype="bf16", sshs_model_hash="ab")
    adapter = lora(tmp_path / "l.safetensors")
    report = lorafold.merge(tmp_path / "ltx.safetensors", [adapter], tmp_path / "out", dtype=dtype)
    gone = {"sshs_model_hash"} | ({"dtype"} if dtype else set())
    found = remarks(tmp_path / "out" / "ltx.safetensors")
    assert found == {name: text for name, text in said.items() if name not in gone} | {"format": "pt"}
    for name in gone:
        assert sum(f"'{name}'" in note for note in report.plan.notes) == 1
    assert lorafold.verify(tmp_path / "out", tmp_path / "ltx.safetensors", [adapter]).failures == ()
    lorafold.unmerge(tmp_path / "out", tmp_path / "restored", base=tmp_path / "ltx.safetensors")
    assert (tmp_path / "restored" / "ltx.safetensors").read_bytes() == (tmp_path / "ltx.safetensors").read_bytes()


@pytest.mark.parametrize("named", [f"model.diffusion_model.{TO_Q}", TO_Q, "attn1.to_q"])
def test_what_is_said_of_a_layer_that_is_cast_goes(tmp_path: Path, named: str) -> None:
    layers = json.dumps({"layers": {named: {"format": "x"}}})
    comfy(tmp_path / "ltx.safetensors", **{OF_LAYERS: layers})
    adapter = lora(tmp_path / "l.safetensors")
    lorafold.merge(tmp_path / "ltx.safetensors", [adapter], tmp_path / "out")
    assert remarks(tmp_path / "out" / "ltx.safetensors")[OF_LAYERS] == layers
    lorafold.merge(tmp_path / "ltx.safetensors", [adapter], tmp_path / "out", overwrite=True, dtype="F32")
    assert OF_LAYERS not in remarks(tmp_path / "out" / "ltx.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', "[" * 50_000])
def test_what_nobody_understands_is_kept_unless_something_is_cast(tmp_path: Path, text: str) -> None:
    comfy(tmp_path / "ltx.safetensors", **{OF_LAYERS: text})
    adapter = lora(tmp_path / "l.safetensors")
    lorafold.merge(tmp_path / "ltx.safetensors", [adapter], tmp_path / "out")
    assert remarks(tmp_path / "out" / "ltx.safetensors")[OF_LAYERS] == text
    lorafold.merge(tmp_path / "ltx.safetensors", [adapter], tmp_path / "out", overwrite=True, dtype="F32")
    assert OF_LAYERS not in remarks(tmp_path / "out" / "ltx.safetensors")


def test_each_file_has_its_own_and_divided_anew_they_have_what_all_say(tmp_path: Path, road: tuple[Path, Path]) -> None:
    base, adapter = road
    remarked(base, FIRST, {"format": "pt", "a": "1", "b": "2", "only": "first"})
    remarked(base, SECOND, {"format": "pt", "b": "2", "a": "other"})
    lorafold.merge(base, [adapter], tmp_path / "out")
    assert remarks(tmp_path / "out" / FIRST) == {"format": "pt", "a": "1", "b": "2", "only": "first"}
    assert remarks(tmp_path / "out" / SECOND) == {"format": "pt", "b": "2", "a": "other"}
    report = lorafold.merge(base, [adapter], tmp_path / "packed", max_shard_size=150)
    for file in (tmp_path / "packed").glob("*.safetensors"):
        assert remarks(file) == {"format": "pt", "b": "2"}
    assert any("'a'" in note and "not all files of the base" in note for note in report.plan.notes)
    assert any("'only'" in note for note in report.plan.notes)
    for out in ("out", "packed"):
        assert lorafold.verify(tmp_path / out, base, [adapter]).failures == ()
        lorafold.unmerge(tmp_path / out, tmp_path / "restored", base=base, overwrite=True)
        assert (tmp_path / "restored" / FIRST).read_bytes() == (base / FIRST).read_bytes()


def test_a_file_that_is_not_changed_keeps_its_hash(tmp_path: Path, road: tuple[Path, Path]) -> None:
    base, _ = road
    for name in (FIRST, SECOND):
        remarked(base, name, {"format": "pt", **dict.fromkeys(OF_THE_BYTES, "0")})
    adapter = plain_adapter(tmp_path / "one", layers_to_transform=[0])
    held = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in held.items() if ".0." in name}, adapter / "adapter_model.safetensors")
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert report.linked == (SECOND,)
    assert remarks(tmp_path / "out" / FIRST) == {"format": "pt"}
    assert remarks(tmp_path / "out" / SECOND).keys() == {"format", *OF_THE_BYTES}
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()


def test_the_undo_file_gives_the_bytes_of_the_base(tmp_path: Path, road: tuple[Path, Path]) -> None:
    base, adapter = road
    remarked(base, FIRST, {"x": "1", **dict.fromkeys((*OF_THE_BYTES, *OF_THE_DTYPE), "0")})
    remarked(base, SECOND, None)
    lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo", dtype="F32")
    assert remarks(tmp_path / "out" / FIRST) == {"x": "1", "format": "pt"}
    lorafold.unmerge(tmp_path / "out", tmp_path / "restored", undo=tmp_path / "undo")
    for name in (FIRST, SECOND):
        assert (tmp_path / "restored" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("change", [{"x": "2"}, {"more": "1"}, {"x": None}, {"format": "np"}])
def test_remarks_are_part_of_the_proof(tmp_path: Path, road: tuple[Path, Path], change: dict[str, Any]) -> None:
    base, adapter = road
    remarked(base, FIRST, {"format": "pt", "x": "1"})
    lorafold.merge(base, [adapter], tmp_path / "out", verify=False)
    new = {name: text for name, text in ({"format": "pt", "x": "1"} | change).items() if text is not None}
    remarked(tmp_path / "out", FIRST, new)
    (failure,) = lorafold.verify(tmp_path / "out", base, [adapter]).failures
    assert f"{FIRST} has other metadata than expected: {next(iter(change))} is" in failure


def test_a_head_that_says_the_same_in_other_bytes_is_none(tmp_path: Path, road: tuple[Path, Path]) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "out", verify=False)
    data = (tmp_path / "out" / FIRST).read_bytes()
    size = int.from_bytes(data[:8], "little")
    head = json.dumps(json.loads(data[8 : 8 + size])).encode()  # with spaces
    (tmp_path / "out" / FIRST).write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == (
        f"{FIRST} has another header than expected, its metadata being the same",
    )

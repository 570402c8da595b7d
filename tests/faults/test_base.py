"""Rows 20 to 41, 53 and 64: a base that is damaged, contradicts itself, or leads elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import different, edit_json, tensors

SHARD, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.q_proj.weight"
NORM = "model.layers.0.norm.weight"


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "C:x.safetensors", "a\\x.safetensors", "a/x.safetensors", "x\0.safetensors"]
)
def test_row_20_names_that_lead_elsewhere(road: Any, name: str) -> None:
    road.index(lambda weight_map: weight_map.update({Q0: name}))
    said = road.refused(INDEX, Q0, "expected the plain name of a file")
    assert name.replace("\0", "\\x00") in said


def test_row_21_links_out_of_the_folder_and_hub_caches(road: Any) -> None:
    (road.folder / "elsewhere").mkdir()
    secret = road.folder / "elsewhere" / SHARD
    os.rename(road.base / SHARD, secret)
    (road.base / SHARD).symlink_to(secret)
    road.refused(SHARD, "leaves its folder", str(secret))
    (road.base / SHARD).unlink()
    os.rename(secret, road.base / SHARD)
    snapshot = as_hub_cache(road)
    code, _, err = road.run("merge", snapshot, road.adapter, "-o", road.out)
    assert (code, err) == (0, "")


def as_hub_cache(road: Any) -> Path:
    """The base as a snapshot in a hub cache."""
    repository = road.folder / "hub" / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "a1b2", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in road.base.iterdir():
        data = file.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return Path(snapshot)


@pytest.mark.parametrize("kind", ["loop", "fifo", "device", "folder", "dangling"])
def test_row_22_shards_that_are_no_files(road: Any, kind: str) -> None:
    place = road.base / SHARD
    place.unlink()
    if kind == "loop":
        place.symlink_to(place.name)
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("gone.safetensors")
    said = {
        "loop": "cannot be followed",
        "fifo": "a named pipe",
        "device": "leaves its folder",
        "folder": "a folder",
        "dangling": "to nothing",
    }
    road.refused(SHARD, said[kind])


def test_row_23_a_missing_shard(road: Any) -> None:
    (road.base / SECOND).unlink()
    road.refused(SECOND, "is missing", "says that it holds 3 tensors")


@pytest.mark.parametrize("change", [-1, -100, 1, 8])
def test_row_24_truncated_shard(road: Any, change: int) -> None:
    data = (road.base / SHARD).read_bytes()
    (road.base / SHARD).write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    road.refused(SHARD, f"expected {len(data)} bytes, found {len(data) + change}")


def test_row_25_truncated_while_it_is_read(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import merge_outputs as writing

    def truncating(part: Any) -> None:  # called when all is planned and nothing is written
        os.truncate(road.base / SHARD, (road.base / SHARD).stat().st_size - 50)

    monkeypatch.setattr(writing, "check_numbers", truncating)
    road.refused(SHARD, "has changed since its header was read", "its size was")


def test_row_26_changed_between_plan_and_read(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import merge_outputs as writing

    def touching(part: Any) -> None:
        os.utime(road.base / SHARD, ns=(1, 1))

    monkeypatch.setattr(writing, "check_numbers", touching)
    road.refused(SHARD, "has changed since its header was read", "its mtime_ns was")


def test_row_27_an_index_that_promises_too_much(road: Any) -> None:
    road.index(lambda weight_map: weight_map.update({"model.extra.weight": SHARD}))
    road.refused(INDEX, "'model.extra.weight'", SHARD, "is in no shard")


def test_row_28_a_tensor_that_the_index_leaves_out(road: Any) -> None:
    road.index(lambda weight_map: weight_map.pop(NORM))
    road.refused(INDEX, "does not list 1 tensors", f"'{NORM}'", SHARD, "--repair-index")
    assert f"did not say where '{NORM}' are; they are taken from where they are" in road.merge("--repair-index")
    assert torch.equal(tensors(road.out)[NORM], tensors(road.base)[NORM])
    index = json.loads((road.out / INDEX).read_text())["weight_map"]
    assert index.keys() == tensors(road.base).keys()
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0
    before = {path.name: path.read_bytes() for path in road.base.iterdir()}
    assert road.run("unmerge", road.out, "--base", road.base, "-o", road.folder / "again")[0] == 0
    assert {path.name: path.read_bytes() for path in (road.folder / "again").iterdir()} == before


def test_row_28_a_tensor_elsewhere_and_a_shard_that_the_index_leaves_out(road: Any) -> None:
    road.index(lambda weight_map: weight_map.update({NORM: SECOND}))
    road.refused(INDEX, f"'{NORM}' should be in {SECOND} and is in {SHARD}", "--repair-index")
    assert f"'{NORM}'" in road.run("plan", road.base, road.adapter, "--repair-index")[1]
    road.index(lambda weight_map: [weight_map.pop(name) for name in list(weight_map) if "layers.1" in name])
    road.index(lambda weight_map: weight_map.update({NORM: SHARD}))
    road.refused(INDEX, "does not list 3 tensors that its shards hold", SECOND, "--repair-index")
    road.merge("--repair-index")
    assert tensors(road.out).keys() == tensors(road.base).keys()
    (road.base / SECOND).unlink()  # what no file holds cannot be repaired
    road.index(lambda weight_map: weight_map.update({"model.gone.weight": SHARD}))
    said = road.refused("'model.gone.weight'", "is in no shard", options=("--repair-index", "--overwrite"))
    assert "or take" not in said


def test_row_29_a_tensor_in_two_shards(road: Any) -> None:
    held = load_file(road.base / SECOND)
    road.shard(**{"model.layers.1.norm.weight": held["model.layers.1.norm.weight"]})
    road.refused("'model.layers.1.norm.weight' is in two shards", SHARD, SECOND)


def test_row_30_two_checkpoints_in_one_folder(road: Any) -> None:
    stale = {name: torch.zeros_like(tensor) for name, tensor in tensors(road.base).items()}
    save_file(stale, road.base / "model.safetensors", metadata={"format": "pt"})
    road.refused("holds two checkpoints", INDEX, "model.safetensors", "index or single")
    road.merge("--prefer", "single")
    assert not tensors(road.out)[NORM].any()
    road.merge("--prefer", "index", "--overwrite")
    assert tensors(road.out)[NORM].any()
    assert not (road.out / "model.safetensors").exists()
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


@pytest.mark.parametrize("where", ["header", "index", "config", "adapter"])
def test_row_31_a_key_that_stands_twice(road: Any, where: str) -> None:
    header, data = header_of(road.base / SHARD)
    entry = json.dumps(header[NORM])
    texts = {"index": road.base / INDEX, "config": road.base / "config.json", "adapter": road.adapter / "adapter_config.json"}
    if where == "header":
        with_header(road.base / SHARD, (json.dumps(header)[:-1] + f', "{NORM}": {entry}}}').encode(), data)
        road.refused(SHARD, f"'{NORM}' stands twice")
    else:
        text = texts[where].read_text().rstrip()
        key = {"index": "metadata", "config": "model_type", "adapter": "r"}[where]
        texts[where].write_text(f'{text[:-1]}, "{key}": {{}}}}')
        road.refused(texts[where].name, f"'{key}' stands twice")


def test_row_32_headers_that_would_fill_the_memory(road: Any) -> None:
    data = (road.base / SHARD).read_bytes()
    for length, said in ((2**62, "more than the 100000000"), (100_000_001, "more than the"), (50_000_000, "but the file has")):
        (road.base / SHARD).write_bytes(struct.pack("<Q", length) + data[8:])
        road.refused(SHARD, said)
    many = b"{" + b'"":{},' * 600_000 + b"}"
    with_header(road.base / SHARD, many, b"")
    road.refused(SHARD, "more than the 500000 tensors")


def test_row_33_sizes_that_overflow_and_huge_empty_ones(road: Any) -> None:
    header, data = header_of(road.base / SHARD)
    with_header(road.base / SHARD, header | {NORM: {**header[NORM], "shape": [2**32, 2**32]}}, data)
    road.refused(SHARD, NORM, "more elements than can be addressed")
    empty = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [len(data), len(data)]}
    with_header(road.base / SHARD, header | {"model.empty": empty}, data)
    road.index(lambda weight_map: weight_map.update({"model.empty": SHARD}))
    road.merge()
    assert header_of(road.out / SHARD)[0]["model.empty"]["shape"] == [0, 2**40]


@pytest.mark.parametrize(("start", "stop", "said"), [(-2, 0, "overlaps"), (2, 0, "hole"), (0, 2, "takes 16 bytes")])
def test_row_34_overlaps_and_holes(road: Any, start: int, stop: int, said: str) -> None:
    header, data = header_of(road.base / SHARD)
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    first, end = header[last]["data_offsets"]
    moved = {"dtype": "U8", "shape": [end - first - start], "data_offsets": [first + start, end]}
    if said == "takes 16 bytes":
        moved = {"dtype": "BF16", "shape": [8], "data_offsets": [first, first + 18]}
    with_header(road.base / SHARD, header | {last: moved}, data)
    road.refused(SHARD, last, said)
    with_header(road.base / SHARD, header | {last: {**header[last], "data_offsets": [end, first]}}, data)
    road.refused(SHARD, last, "two rising byte offsets")


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "X99"])
def test_row_35_types_that_are_not_known(road: Any, dtype: str) -> None:
    header, data = header_of(road.base / SHARD)
    end = len(data)
    header["model.scale"] = {
        "dtype": dtype,
        "shape": [32 if dtype == "F4" else 16 if dtype == "F8_E8M0" else 2],
        "data_offsets": [end, end + 16],
    }
    with_header(road.base / SHARD, header, data + bytes(range(16)))
    road.index(lambda weight_map: weight_map.update({"model.scale": SHARD}))
    road.merge()
    merged, found = header_of(road.out / SHARD)
    start, stop = merged["model.scale"]["data_offsets"]
    assert (merged["model.scale"]["dtype"], found[start:stop]) == (dtype, bytes(range(16)))
    header[Q0] = {**header[Q0], "dtype": "I16"}
    with_header(road.base / SHARD, header, data + bytes(range(16)))
    road.refused(SHARD, Q0, "of type I16", "expected one of BF16", options=("--overwrite",))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8"])
def test_row_36_a_base_that_says_it_is_quantised(road: Any, method: str) -> None:
    road.shard(**{Q0: torch.zeros(32, 1, dtype=torch.uint8)})
    edit_json(road.base / "config.json", quantization_config={"quant_method": method})
    road.refused("is quantised", method, "unquantised base", "dequantize()")


QUANTISED: dict[str, tuple[dict[str, torch.Tensor | None], tuple[str, ...]]] = {
    "nf4": (
        {
            "weight": torch.zeros(32, 1, dtype=torch.uint8),
            "weight.absmax": torch.ones(1),
            "weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
        },
        ("quant_state.bitsandbytes__nf4", "not JSON"),
    ),
    "int8": (
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.ones(8)},
        ("is quantised", "bitsandbytes int8", "--output-format same"),
    ),
    "gptq": (
        {"weight": None, "qweight": torch.zeros(1, 8, dtype=torch.int32), "scales": torch.ones(1, 8)},
        ("qzeros' is missing", "qweight' cannot be decoded", "another checkpoint"),
    ),
    "packed": (
        {"weight": None, "weight_packed": torch.zeros(8, 1, dtype=torch.int32)},
        ("weight_shape' is missing", "weight_packed' cannot be decoded", "another checkpoint"),
    ),
    "scaled": (
        {"weight": torch.zeros(8, 8).bfloat16(), "weight_scale": torch.ones(1)},
        ("is quantised", "FP8 or INT8 with scales", "unquantised base"),
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_row_36_a_base_whose_tensors_give_it_away(road: Any, kind: str) -> None:
    """No word in its configuration; of floating-point numbers too, where a scale beside them changes what they mean."""
    parts, expected = QUANTISED[kind]
    module = Q0.removesuffix(".weight")
    road.shard(**{f"{module}.{name}": tensor for name, tensor in parts.items()})

    def change(weight_map: dict[str, str]) -> None:
        for name, tensor in parts.items():
            weight_map.pop(f"{module}.{name}", None) if tensor is None else weight_map.update({f"{module}.{name}": SHARD})

    road.index(change)
    road.refused(*expected)


def test_row_36_a_base_that_can_be_decoded_is_asked_for_its_output(road: Any) -> None:
    module = Q0.removesuffix(".weight")
    road.shard(**{f"{module}.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": torch.ones(1, 1)})
    road.index(lambda weight_map: weight_map.update({f"{module}.weight_scale_inv": SHARD}))
    road.refused("is quantised", "FP8 with one scale", "--output-format same", "--output-format bf16")


def test_row_36_what_is_not_quantised_of_it_can_be_merged(road: Any) -> None:
    """An adapter for other modules than the quantised ones."""
    v = Q0.replace("q_proj", "v_proj").removesuffix(".weight")
    held = load_file(road.adapter / "adapter_model.safetensors")
    road.edit(**{name: None for name in held if "layers.0.v_proj" in name})
    road.shard(**{f"{v}.weight": torch.zeros(8, 8, dtype=torch.int8), f"{v}.SCB": torch.ones(8)})
    road.index(lambda weight_map: weight_map.update({f"{v}.SCB": SHARD}))
    road.merge()
    assert torch.equal(tensors(road.out)[f"{v}.weight"], tensors(road.base)[f"{v}.weight"])


def test_row_37_names_that_drive_a_terminal(road: Any) -> None:
    header, data = header_of(road.base / SHARD)
    evil = "model.\x1b[31mred\x1b]0;owned\x07\n.weight"
    header = {(evil if name == NORM else name): entry for name, entry in header.items()}
    with_header(road.base / SHARD, header, data)
    said = road.refused(SHARD, "model.\\x1b[31mred\\x1b]0;owned\\x07\\n.weight")
    assert "\x1b" not in said
    assert "\x07" not in said
    road.index(lambda weight_map: weight_map.update({evil: weight_map.pop(NORM)}))
    assert "\x1b" not in road.merge()
    code, out, _ = road.run("plan", road.base, road.adapter, "--all")
    assert code == 0
    assert "\x1b" not in out
    assert "\\x1b[31mred" in out


def test_row_38_remarks_that_are_no_text(road: Any) -> None:
    header, data = header_of(road.base / SHARD)
    for bad in ({"format": 1}, ["pt"], "pt", {"a": None}):
        with_header(road.base / SHARD, header | {"__metadata__": bad}, data)
        road.refused(SHARD, "__metadata__ must map text to text")
    with_header(road.base / SHARD, header | {"__metadata__": {"x": "y" * (32 << 20)}}, data)
    road.refused(SHARD, "__metadata__ has 33554433 characters, more than the 33554432")


def test_row_38_remarks_are_kept_but_for_those_that_become_false(road: Any) -> None:
    header, data = header_of(road.base / SHARD)
    own = {
        "config": '{"layers": 2}',
        "modelspec.title": "x\x1b[31m",
        "modelspec.hash_sha256": "0x1",
        "dtype": "bf16",
        "x": "y" * 10**5,
    }
    with_header(road.base / SHARD, header | {"__metadata__": {"format": "np", **own}}, data)
    told = road.merge()
    kept = {name: own[name] for name in ("config", "modelspec.title", "dtype", "x")}
    assert header_of(road.out / SHARD)[0]["__metadata__"] == {"format": "pt", **kept}
    assert f"the metadata field 'modelspec.hash_sha256' of {SHARD} is left out: it is a hash of the tensors as they were" in told
    assert f"the metadata field 'format' of {SHARD} is rewritten" in told
    assert "'x'" not in told
    told = road.merge("--overwrite", "--dtype", "float32")
    assert header_of(road.out / SHARD)[0]["__metadata__"] == {
        "format": "pt",
        **{name: kept[name] for name in kept if name != "dtype"},
    }
    assert f"the metadata field 'dtype' of {SHARD} is left out: tensors are stored in another dtype than it says" in told


def test_row_41_code_is_text(road: Any) -> None:
    edit_json(road.base / "config.json", auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True)
    (road.base / "evil.py").write_text("raise SystemExit('owned')")
    road.merge()
    assert "evil.py" not in os.listdir(road.out)
    assert json.loads((road.out / "config.json").read_text())["auto_map"] == {"AutoModel": "evil.Model"}


def test_row_53_tied_weights(road: Any) -> None:
    embedding = torch.randn(12, 8).bfloat16()
    road.shard(**{"model.embed_tokens.weight": embedding})
    road.index(lambda weight_map: weight_map.update({"model.embed_tokens.weight": SHARD}))
    edit_json(road.base / "config.json", tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    prefix = "base_model.model.lm_head"
    road.edit(**{f"{prefix}.lora_A.weight": torch.randn(2, 8), f"{prefix}.lora_B.weight": torch.randn(12, 2)})
    road.config(target_modules=["q_proj", "v_proj", "lm_head"])
    assert "tie_word_embeddings becomes false" in road.merge()
    merged = tensors(road.out)
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert not torch.equal(merged["lm_head.weight"], embedding)
    assert json.loads((road.out / "config.json").read_text())["tie_word_embeddings"] is False


def test_row_64_a_flipped_bit(road: Any) -> None:
    file = road.base / SHARD
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    snapshot = as_hub_cache(road)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    road.refused(SHARD, f"expected sha256 {good}", "found", options=("--expect-sha256", f"{SHARD}={good}"))
    road.refused("none of the input files", options=("--expect-sha256", f"model-9.safetensors={good}"))
    road.refused("--expect-sha256", options=("--expect-sha256", "x"), code=2)
    blob = (snapshot / SHARD).resolve()
    assert road.run("merge", snapshot, road.adapter, "-o", road.out, "--verify-input")[0] == 0
    blob.write_bytes(data)
    code, _, err = road.run("merge", snapshot, road.adapter, "-o", road.folder / "no", "--verify-input")
    assert code == 1
    assert f"expected sha256 {good}" in err
    assert not (road.folder / "no").exists()
    receipt = road.receipt()
    assert {SHARD, SECOND} == receipt["files"].keys()
    assert road.run("verify", road.out)[0] == 0
    for name in (SHARD, "config.json"):
        whole = (road.out / name).read_bytes()
        (road.out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, _, err = road.run("verify", road.out)
        assert code == 3
        assert name in err
        (road.out / name).write_bytes(whole)
    assert road.run("verify", road.out)[0] == 0


@pytest.mark.parametrize("kind", [["gpt2"], {"a": 1}, 7, None, True])
def test_a_model_type_that_is_no_text_names_no_model(road: Any, kind: Any) -> None:
    """As where there is none."""
    road.merge()
    wanted = tensors(road.out)
    shutil.rmtree(road.out)
    config = json.loads((road.base / "config.json").read_text())
    (road.base / "config.json").write_text(json.dumps({**config, "model_type": kind, "text_config": {"model_type": kind}}))
    road.merge()
    assert different(tensors(road.out), wanted) == {}

"""The whole road: what is written, what is left alone, what is refused before a byte is written, and what a run leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import AlreadyMergedError, CheckpointError, NonFiniteError, OutputExistsError
from models import (
    added,
    different,
    edit_json,
    edit_tensors,
    expected,
    plain_adapter,
    plain_base,
    tensors,
)

Q0 = "model.layers.0.q_proj"
A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


def updates(adapter: Path, weight: float = 1.0) -> dict[str, list[lorafold.LowRankUpdate]]:
    """What a `plain_adapter` adds, read without lorafold's reader: lora_alpha 4, r 2."""
    held = load_file(adapter / "adapter_model.safetensors")
    modules = {name.removesuffix(".lora_A.weight") for name in held if name.endswith(".lora_A.weight")}
    return {
        f"{module.removeprefix('base_model.model.')}.weight": [
            lorafold.LowRankUpdate(held[f"{module}.lora_A.weight"], held[f"{module}.lora_B.weight"], 2.0 * weight)
        ]
        for module in modules
    }


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_of_the_oracle_in_every_dtype_and_of_every_dtype(tmp_path: Path, dtype: torch.dtype, precision: Any) -> None:
    base, adapter = plain_base(tmp_path / "base", dtype=dtype), plain_adapter(tmp_path / "adapter")
    for name, target in (
        ("own", None),
        ("BF16", torch.bfloat16),
        ("F16", torch.float16),
        ("F32", torch.float32),
        ("F64", torch.float64),
    ):
        out = tmp_path / name
        lorafold.merge(base, [adapter], out, precision=precision, dtype=None if target is None else name)
        wanted = expected(tensors(base), updates(adapter), {}, target)
        if precision == "exact":
            assert different(tensors(out), wanted) == {}
        else:  # sums of r + 1 = 3 terms in float32 (or better): each term and addition off by 2^-24 of at most 64
            for tensor, value in tensors(out).items():
                assert (value.double() - wanted[tensor].double()).abs().max() <= 64 * 6 * 2.0**-24 + 64 * torch.finfo(
                    value.dtype
                ).eps
        assert json.loads((out / "config.json").read_text())["dtype"] == {
            "own": "bfloat16", "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"
        }[name]  # fmt: skip
        assert lorafold.verify(out, base, [adapter]).failures == ()


def test_several_adapters_are_summed_once_and_their_order_changes_no_bit(tmp_path: Path, base: Path) -> None:
    given = [(plain_adapter(tmp_path / f"a{i}", seed=i), weight) for i, weight in enumerate((1.0, 0.7, -0.3))]
    wanted = expected(tensors(base), added(*(updates(path, weight) for path, weight in given)), {})
    for i, order in enumerate(([0, 1, 2], [2, 0, 1], [1, 2, 0])):
        lorafold.merge(base, [given[j] for j in order], tmp_path / f"out{i}")
        assert different(tensors(tmp_path / f"out{i}"), wanted) == {}
        assert lorafold.verify(tmp_path / f"out{i}", base, given).failures == ()  # in whatever order they are given
    assert lorafold.verify(tmp_path / "out0", base, given[:2]).failures
    assert lorafold.verify(tmp_path / "out0", base, [*given[:2], (given[2][0], -0.2)]).failures


def test_what_is_not_merged_is_copied_byte_for_byte(tmp_path: Path, adapter: Path) -> None:
    """Types that torch does not know, scalars, empty tensors and numbers that are not finite included."""
    base = plain_base(tmp_path / "base")
    (base / "model.safetensors.index.json").unlink()
    held = tensors(base)
    for file in base.glob("*.safetensors"):
        file.unlink()
    held |= {
        "nan": torch.tensor([float("nan"), float("inf")]), "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4), "none": torch.zeros(4, 0),
        "int": torch.arange(5), "bool": torch.tensor([True, False]), "fp8": torch.ones(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    copied_names = {step.tensor for step in report.plan.steps if step.action == "copy"}
    assert copied_names >= {"nan", "scalar", "empty", "none", "int", "bool", "fp8", "model.layers.0.norm.weight"}
    written = tensors(tmp_path / "out")
    assert different({n: written[n] for n in copied_names}, {n: held[n] for n in copied_names}) == {}

    wide = lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F64")
    assert {step.tensor for step in wide.plan.steps if step.action == "copy"} == {"int", "bool", "fp8"}
    assert tensors(tmp_path / "wide")["scalar"].item() == 3.5
    assert lorafold.verify(tmp_path / "wide", base, [adapter]).failures == ()


def exotic_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file with types of any name."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_types_that_nobody_knows_are_copied_and_proven(tmp_path: Path, adapter: Path) -> None:
    base = plain_base(tmp_path / "base")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    exotic_file(base / "exotic.safetensors", {"odd": ("F9_E5", [4], b"123456789"), "nibbles": ("F4", [2, 2], b"ab")})
    index["weight_map"] |= {"odd": "exotic.safetensors", "nibbles": "exotic.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    lorafold.merge(base, [adapter], tmp_path / "out")
    written = (tmp_path / "out" / "exotic.safetensors").read_bytes()
    assert b"123456789" in written
    assert b"ab" in written[-12:]
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 544 + 11
    (tmp_path / "out" / "exotic.safetensors").write_bytes(written.replace(b"123456789", b"123456780"))
    assert any("odd differs" in failure for failure in lorafold.verify(tmp_path / "out", base, [adapter]).failures)


def strict_index(folder: Path) -> dict[str, Any]:
    """The index, held to what llama.cpp's converter and transformers demand of it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"] == {"total_size": sum(t.nbytes for tensors in held.values() for t in tensors.values())}
    return index


def test_files_keep_the_division_of_the_base_or_follow_the_size(tmp_path: Path, base: Path, adapter: Path) -> None:
    lorafold.merge(base, [adapter], tmp_path / "same")
    strict_index(tmp_path / "same")
    assert {p.name for p in (tmp_path / "same").glob("*.safetensors")} == {p.name for p in base.glob("*.safetensors")}
    lorafold.merge(base, [adapter], tmp_path / "small", max_shard_size=200)
    strict_index(tmp_path / "small")
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in (tmp_path / "small").glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) <= 200
    lorafold.merge(base, [adapter], tmp_path / "one", max_shard_size=10**9)
    assert sorted(p.name for p in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    for out in ("small", "one"):
        assert different(tensors(tmp_path / out), tensors(tmp_path / "same")) == {}
        assert lorafold.verify(tmp_path / out, base, [adapter]).failures == ()
    lorafold.merge(tmp_path / "one" / "model.safetensors", [plain_adapter(tmp_path / "b", seed=9)], tmp_path / "from_one_file")
    assert (tmp_path / "from_one_file" / "model.safetensors").exists()


def test_a_snapshot_of_a_hub_cache(tmp_path: Path, base: Path, adapter: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(base.iterdir())):
        blob = repository / "blobs" / f"{i:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    lorafold.merge(snapshot, [adapter], tmp_path / "out")
    lorafold.merge(base, [adapter], tmp_path / "plain")
    assert different(tensors(tmp_path / "out"), tensors(tmp_path / "plain")) == {}
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert 'base_model: "org/tiny"' in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "lorafold.json").read_text())["base"]["name"] == "org/tiny"


def test_config_and_companions_go_along_and_the_rest_stays(tmp_path: Path, base: Path, adapter: Path) -> None:
    goes = dict.fromkeys(
        ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"), "text"
    )
    stays = {"pytorch_model.bin": "x", "modeling_tiny.py": "x", "optimizer.pt": "x", "trainer_state.json": "{}"}
    for name, text in (goes | stays).items():
        (base / name).write_text(text)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n# Tiny\n")
    edit_json(base / "config.json", extra={"nested": [1, 2.5, None, "é"]})
    report = lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out", command="lorafold merge `x`")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {p.name for p in base.iterdir()} - stays.keys() | {"lorafold.json", "README.md"}
    for name, text in goes.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert all(note.startswith("left behind in the base, ") for note in report.notes)
    assert {name for note in report.notes for name in note.rpartition(": ")[2].split(", ")} == stays.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---")[1]
    assert 'base_model: "org/tiny"\n' in head  # as the adapter states it: config.json leaves it open
    assert "library_name: transformers\nlicense: apache-2.0\nlicense_link: LICENSE\ntags:\n- lora\n" in head
    assert "the adapter `adapter` at weight 0.5" in card
    assert "lorafold merge 'x'" in card


def test_the_adapters_tokenizer_wins_whole_and_is_said(tmp_path: Path, base: Path, adapter: Path) -> None:
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        (base / name).write_text("base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text("adapter")
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    texts = {
        p.name: p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".jinja") and len(p.read_bytes()) < 9
    }
    assert texts == {"tokenizer.json": "adapter", "tokenizer_config.json": "adapter", "generation_config.json": "base"}
    assert report.notes == ("the tokenizer is that of the adapter adapter, not the base's",)
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()
    (adapter / "tokenizer.json").unlink()
    (adapter / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        lorafold.merge(base, [adapter], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_file_modes_follow_the_umask(tmp_path: Path, base: Path, adapter: Path) -> None:
    for file in base.iterdir():
        file.chmod(0o600)
    old = os.umask(0o022)
    try:
        lorafold.merge(base, [adapter], tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_what_the_receipt_says(tmp_path: Path, base: Path, adapter: Path) -> None:
    report = lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out", rounding="stochastic", seed=3)
    receipt = json.loads((tmp_path / "out" / "lorafold.json").read_text())
    planned = report.plan.adapters[0]
    assert receipt["adapters"] == [
        {
            "name": "adapter", "sha256": planned.sha256, "adapter_weight": 0.5, "format": "peft", "base_model": "org/tiny",
            "left_out": {},
        }
    ]  # fmt: skip
    assert (receipt["precision"], receipt["rounding"], receipt["seed"], receipt["dtype"]) == ("exact", "stochastic", 3, None)
    assert receipt["version"] == lorafold.__version__
    assert receipt["tensors"].keys() == updates(adapter).keys()
    entry = receipt["tensors"][f"{Q0}.weight"]
    assert entry["updates"][0]["scaling"] == 1.0  # 4 / 2 · 0.5
    assert entry["updates"][0]["why"] == "lora_alpha 4 / r 2, times adapter_weight 0.5"
    assert entry["updates"][0]["tensors"] == [f"base_model.model.{Q0}.lora_{each}.weight" for each in "AB"]
    assert entry["kept"] == report.kept[f"{Q0}.weight"].share
    for name, sha256 in receipt["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == sha256
    assert len(receipt["files"]) == 2
    digest = hashlib.sha256((adapter / "adapter_config.json").read_bytes() + (adapter / "adapter_model.safetensors").read_bytes())
    assert planned.sha256 == digest.hexdigest()


def test_the_same_adapter_is_not_merged_twice_unless_asked(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = plain_adapter(tmp_path / "other", seed=8)
    lorafold.merge(base, [adapter], tmp_path / "once")
    with pytest.raises(AlreadyMergedError, match="its receipt lists it") as caught:
        lorafold.merge(tmp_path / "once", [adapter], tmp_path / "twice")
    assert "merge_again=True" in str(caught.value)
    assert not (tmp_path / "twice").exists()
    lorafold.merge(tmp_path / "once", [other], tmp_path / "both")
    receipt = json.loads((tmp_path / "both" / "lorafold.json").read_text())
    assert [each["name"] for each in receipt["adapters"]] == ["adapter", "other"]
    assert lorafold.verify(tmp_path / "both", tmp_path / "once", [other]).failures == ()
    with pytest.raises(AlreadyMergedError):
        lorafold.merge(tmp_path / "both", [adapter], tmp_path / "twice")
    lorafold.merge(tmp_path / "once", [adapter], tmp_path / "twice", merge_again=True)
    assert lorafold.verify(tmp_path / "twice", tmp_path / "once", [adapter]).failures == ()


def test_an_unreadable_number_in_a_targeted_tensor_of_the_base(tmp_path: Path, base: Path, adapter: Path) -> None:
    file = base / "model-00002-of-00002.safetensors"
    held = load_file(file)
    held["model.layers.1.v_proj.weight"][3, 4] = float("inf")
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"v_proj.weight' holds 1 .* not finite in the base, the first at \[3, 4\]: inf"):
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_a_dtype_by_whatever_name(tmp_path: Path, base: Path, adapter: Path, dtype: Any) -> None:
    lorafold.merge(base, [adapter], tmp_path / "one", dtype="F32")
    lorafold.merge(base, [adapter], tmp_path / "other", dtype=dtype)
    assert different(tensors(tmp_path / "other"), tensors(tmp_path / "one")) == {}
    (tmp_path / "outs").mkdir()
    (report,) = lorafold.merge_each(base, [adapter], tmp_path / "outs", dtype=dtype)
    assert different(tensors(Path(report.out)), tensors(tmp_path / "one")) == {}
    assert lorafold.plan(base, [adapter], dtype=dtype).options.dtype == "F32"


def test_a_sum_that_leaves_the_range_of_the_dtype(tmp_path: Path, adapter: Path) -> None:
    base = plain_base(tmp_path / "base", dtype=torch.float16)
    edit_tensors(adapter, lambda held: {n: t * 1e4 if n == A0 else t for n, t in held.items()})
    with pytest.raises(NonFiniteError, match=r"q_proj.weight' holds \d+ .* not finite after merging into F16") as caught:
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert "dtype=" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    lorafold.merge(base, [adapter], tmp_path / "out", dtype="F32")


def test_finite_numbers_whose_squares_are_not(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda held: {n: t * 1e18 for n, t in held.items()})
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["kept"] == pytest.approx(1, abs=0.01)
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()


def test_warns_where_the_rounding_swallows_the_update(tmp_path: Path, base: Path, adapter: Path) -> None:
    edit_tensors(adapter, lambda held: {n: t * 0.01 for n, t in held.items()})
    nearest = lorafold.merge(base, [adapter], tmp_path / "nearest")
    assert nearest.kept_in_all < 0.9
    assert "rounding='stochastic'" in nearest.warnings[-1]
    wide = lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F32")
    assert wide.kept_in_all == pytest.approx(1, abs=1e-3)
    assert wide.warnings == ()


def test_overwrite_replaces_a_checkpoint_and_only_that(tmp_path: Path, base: Path, adapter: Path) -> None:
    lorafold.merge(base, [adapter], tmp_path / "out")
    other = plain_adapter(tmp_path / "other", seed=8)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        lorafold.merge(base, [other], tmp_path / "out")
    lorafold.merge(base, [other], tmp_path / "out", overwrite=True)
    assert lorafold.verify(tmp_path / "out", base, [other]).failures == ()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputExistsError, match="does not look like a checkpoint"):
        lorafold.merge(base, [adapter], tmp_path / "mine", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "mine", "other", "out"]


def test_no_verify_writes_the_same_files(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert lorafold.merge(base, [adapter], tmp_path / "quick", verify=False).proof is None
    lorafold.merge(base, [adapter], tmp_path / "out")
    assert different(tensors(tmp_path / "quick"), tensors(tmp_path / "out")) == {}
    assert lorafold.verify(tmp_path / "quick", base, [adapter]).failures == ()


def test_an_adapter_that_has_been_read_is_given_with_or_without_a_weight(tmp_path: Path, base: Path, adapter: Path) -> None:
    read = lorafold.load_adapter(adapter)
    for number, given in enumerate((read, (read, 0.5))):
        plan = lorafold.plan(base, [given])
        assert plan.adapters[0].adapter_weight == (1.0, 0.5)[number]
        assert plan == lorafold.plan(base, [(adapter, (1.0, 0.5)[number])])

"""Bases in GGUF: codes and floats against the gguf package's own numbers, all other bytes kept, split files, proof and undoing."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorafold
from gguf_models import as_tensor, blocks, paired, raw_tensors, stated_by, tensors_of, tiny, types_of, write_gguf
from lorafold import LowRankUpdate
from lorafold.checkpoints.encodings.gguf_blocks import LAYOUTS
from lorafold.errors import CheckpointError, InputError, LorafoldError, OutputError, OutputExistsError, PlanError, VerificationError
from lorafold.files.gguf.gguf_header import read_gguf_header
from lorafold.files.gguf.gguf_layout import gaps
from models import save_adapter
from oracle import correctly_rounded
from quantised import uniform, updates_in, wide

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
EXACT = ("Q4_0", "Q5_0", "Q8_0", "MXFP4", "F16", "BF16", "F32")
"""Types whose numbers float32 holds, so that the gguf package's are exact."""


class Case:
    """A base with a matrix in each type, an adapter on some of them, and what both are, by llama.cpp's names."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapter, self.folder = folder / "base.gguf", folder / "adapter", folder
        tensors = {"rope_freqs.weight": np.ones(3), **tensors_of(tiny(), "llama")}  # of no whole 32 bytes
        self.tensors = tensors
        matrices = [name for name, array in tensors.items() if array.ndim > 1 and "token" not in name]
        self.kinds = dict(zip(matrices, [*LAYOUTS, "F16", "BF16", "F32"] * 2, strict=False)) | {"token_embd.weight": "Q6_K"}
        write_gguf(self.base, tensors, self.kinds, more={"tokenizer.chat_template": "{{ x }}", "quantize.imatrix.file": "i.dat"})
        save_adapter(tiny(), self.adapter, target_modules=TARGETS)
        self.stated = stated_by(self.base)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        self.updates: dict[str, LowRankUpdate] = {}
        for name, (update,) in updates_in(self.adapter).items():
            called = str(names.get_name(name, (".weight",)))
            heads = 4 if ".attn_q." in called else 2 if ".attn_k." in called else 0
            B = as_tensor(paired(update.lora_B.numpy(), heads)) if heads else update.lora_B
            self.updates[called] = LowRankUpdate(update.lora_A, B, update.scaling)

    def merge(self, out: Path, **options: object) -> lorafold.MergeReport:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorafold.LorafoldWarning)  # of scales at random little can be kept
            return lorafold.merge(self.base, [self.adapter], out, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gguf"))


def test_inspect_and_plan_explain_it(case: Case) -> None:
    found = lorafold.inspect(case.base)
    assert found.kind == "checkpoint"
    assert found.details["model_type"] == "llama"
    assert found.details["parameters_by_dtype"]["GGUF Q3_K"] > 0
    assert lorafold.inspect(case.base).details["tensors"]["blk.0.attn_k.weight"]["shape"] == [128, 256]
    with pytest.raises(CheckpointError, match=r"base.gguf: tensor '.*' is quantised \(GGUF .*\), and nothing says") as caught:
        lorafold.plan(case.base, [case.adapter])
    assert "`output_format='same'`" in str(caught.value.hint)
    plan = lorafold.plan(case.base, [case.adapter], output_format="same")
    assert "rows of queries and keys put in llama.cpp's order" in plan.notes
    assert {step.coded.encoding for step in plan.steps if step.coded is not None} <= {f"GGUF {kind}" for kind in LAYOUTS}
    assert "GGUF Q4_0, codes anew" in str(plan)


@pytest.mark.parametrize("output_format", ["fp16", "bf16", "fp32"])
def test_floats_are_the_sum_rounded_once(case: Case, tmp_path: Path, output_format: str) -> None:
    report = case.merge(tmp_path / "out.gguf", output_format=output_format)
    assert report.proof is not None
    assert report.proof.ok
    kind = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[output_format]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[output_format]
    found, kinds = stated_by(tmp_path / "out.gguf"), types_of(tmp_path / "out.gguf")
    checked = 0
    for name, weight in case.stated.items():
        before = types_of(case.base)[name]
        assert kinds[name] == (before if before in ("F16", "BF16", "F32") else kind), name
        updates = [case.updates[name]] if name in case.updates else []
        if before in EXACT:
            own = dtype if before in LAYOUTS else {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[before]
            wanted = torch.from_numpy(correctly_rounded(as_tensor(weight.reshape(weight.shape[0], -1)), updates, own)).to(own)
            assert np.array_equal(found[name], wanted.float().numpy().reshape(weight.shape)), name
            checked += bool(updates)
        else:  # the gguf package rounds products to float32, and then a difference: three half steps at its largest number
            wanted = wide(weight.astype(np.float64), updates)
            error = np.abs(found[name] - wanted)
            step = 2.0 ** {"fp16": -11, "bf16": -8, "fp32": -24}[output_format]
            least = 2.0**-25 if output_format == "fp16" else 0.0  # half a step below its smallest normal number
            assert (error <= np.abs(wanted) * step * 1.001 + np.abs(weight).max() * 2.0**-22 + least).all(), name
    assert checked >= 3
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.file_type"].contents() == {"fp16": 1, "bf16": 32, "fp32": 0}[output_format]
    assert "quantize.imatrix.file" not in fields


def test_same_changes_codes_alone(case: Case, tmp_path: Path) -> None:
    """Types, order, metadata and each byte that is no code of a changed tensor stay."""
    report = case.merge(tmp_path / "out.gguf", output_format="same")
    assert report.proof is not None
    assert report.proof.ok
    assert set(report.kept_by_encoding) <= {f"GGUF {kind}" for kind in LAYOUTS}
    assert types_of(tmp_path / "out.gguf") == types_of(case.base)
    old, new = raw_tensors([case.base]), raw_tensors([tmp_path / "out.gguf"])
    assert list(old) == list(new)
    assert {name for name in old if old[name] != new[name]} == case.updates.keys()
    for name in case.updates:
        kind = case.kinds[name]
        if kind not in LAYOUTS:
            continue
        layout = LAYOUTS[kind]
        mask = np.zeros(layout.size, np.uint8)  # the bits that are codes
        for part in layout.parts:
            for place, shift in zip(part.places, part.shifts, strict=True):
                mask[place] |= ((1 << part.bits) - 1) << shift
        first, second = (np.frombuffer(each[name], np.uint8).reshape(-1, layout.size) for each in (old, new))
        assert not ((first ^ second) & ~mask).any(), name
    before, after = read_gguf_header(case.base), read_gguf_header(tmp_path / "out.gguf")
    assert {key: raw for key, raw in after.pairs.items() if key != "lorafold.receipt"} == before.pairs
    assert list(after.pairs)[-1] == "lorafold.receipt"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_codes_are_those_of_the_sum(tmp_path: Path, kind: str, rounding: str) -> None:
    """Against loops of numpy: of the two neighbours in units of the block's scale, by the tensor's own random numbers."""
    base = write_gguf(tmp_path / "base.gguf", tensors_of(tiny(), "llama"), kind)
    save_adapter(tiny(), tmp_path / "adapter", target_modules=["v_proj"], lora_alpha=16)
    lorafold.merge(
        tmp_path / "base.gguf", [tmp_path / "adapter"], tmp_path / "out.gguf", output_format="same", rounding=rounding, seed=5
    )
    new, old = raw_tensors([tmp_path / "out.gguf"]), raw_tensors([tmp_path / "base.gguf"])
    low, high = (-128, 127) if kind == "Q8_0" else (-8, 7)
    for name, (update,) in updates_in(tmp_path / "adapter").items():
        called = f"blk.{name.split('.')[2]}.attn_v.weight"
        words = np.frombuffer(old[called], np.uint8).reshape(128, 8, -1)
        scales = words[..., :2].copy().view(np.float16).astype(np.float64)
        sums = (wide(base[called], [update]).reshape(128, 8, 32) / scales).clip(low, high)
        floor = np.floor(sums)
        noise = uniform(5, called, sums.size).reshape(sums.shape) if rounding == "stochastic" else None
        nearest = (sums - floor > 0.5) | ((sums - floor == 0.5) & ((floor - low) % 2 == 1))
        codes = (floor + (nearest if noise is None else sums - floor > noise)).clip(low, high).astype(np.int64)
        made = codes.astype(np.int8).view(np.uint8) if kind == "Q8_0" else (codes + 8)[..., :16] | (codes + 8)[..., 16:] << 4
        assert np.concatenate((words[..., :2], made.astype(np.uint8)), -1).tobytes() == new[called], called


def test_no_update_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(case.adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(t) if ".lora_B." in name else t for name, t in load_file(file).items()}, file)
    lorafold.merge(case.base, [tmp_path / "adapter"], tmp_path / "out.gguf", output_format="same")
    assert raw_tensors([tmp_path / "out.gguf"]) == raw_tensors([case.base])


def test_a_float_base_keeps_its_types(case: Case, tmp_path: Path) -> None:
    write_gguf(tmp_path / "base.gguf", tensors_of(tiny(), "llama"), {"blk.0.attn_v.weight": "BF16"})
    for name, options in {"own": {}, "same": {"output_format": "same"}}.items():
        lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / f"{name}.gguf", **options)
        assert types_of(tmp_path / f"{name}.gguf") == types_of(tmp_path / "base.gguf")
    lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "f32.gguf", dtype="float32")
    assert set(types_of(tmp_path / "f32.gguf").values()) == {"F32"}
    assert gguf.GGUFReader(tmp_path / "f32.gguf").fields["general.file_type"].contents() == 0
    lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "f16.gguf", dtype="float16")
    assert {kind for name, kind in types_of(tmp_path / "f16.gguf").items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in types_of(tmp_path / "f16.gguf").items() if "norm" not in name} == {"F16"}


@pytest.mark.parametrize("how", ["base", "undo"])
@pytest.mark.parametrize("output_format", ["same", "bf16"])
def test_proven_and_taken_apart_again(case: Case, tmp_path: Path, output_format: str, how: str) -> None:
    out, undo = tmp_path / "out.gguf", tmp_path / "undo.safetensors"
    case.merge(out, output_format=output_format, **({"undo": undo} if how == "undo" else {}))
    assert lorafold.verify(out).ok
    assert lorafold.verify(out, case.base, [case.adapter]).ok
    assert not lorafold.verify(out, case.base, [(case.adapter, 0.5)]).ok
    source = {"undo": undo} if how == "undo" else {"base": case.base}
    lorafold.unmerge(out, tmp_path / "back.gguf", **source)
    assert (tmp_path / "back.gguf").read_bytes() == case.base.read_bytes()
    lorafold.unmerge(out, tmp_path / "folder", **source)
    assert (tmp_path / "folder" / "base.gguf").read_bytes() == case.base.read_bytes()


def test_every_byte_is_held(case: Case, tmp_path: Path) -> None:
    """A change of any byte of the output is found, with the base and without: header, receipt, numbers, what lies between."""
    out = tmp_path / "out.gguf"
    case.merge(out, output_format="same")
    raw, header = out.read_bytes(), read_gguf_header(out)
    low, high = header.blank or (0, 0)
    tensor, vector = header.tensors["blk.0.attn_v.weight"], header.tensors["output_norm.weight"]
    places = {"a pair": raw.index(b"tiny"), "the receipt": low + 40, "after its text": high - 1, "a code": tensor.start + 700,
              "a copied tensor": vector.start + 5, "the last byte": len(raw) - 1}  # fmt: skip
    places["between"] = gaps(header)[0][0]
    for what, place in places.items():
        out.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        for against in ((), (case.base, [case.adapter])):
            with contextlib.suppress(VerificationError, InputError):
                assert not lorafold.verify(out, *against).ok, (what, against)
    out.write_bytes(raw + b"\0")
    assert not lorafold.verify(out).ok
    assert not lorafold.verify(out, case.base, [case.adapter]).ok
    out.write_bytes(raw)
    assert lorafold.verify(out, case.base, [case.adapter]).ok
    shutil.copy(case.base, tmp_path / "plain.gguf")
    with pytest.raises(VerificationError, match=r"has no lorafold\.json"):
        lorafold.verify(tmp_path / "plain.gguf")


def test_a_second_merge_keeps_the_first_in_its_receipt(case: Case, tmp_path: Path) -> None:
    other = save_adapter(tiny(), tmp_path / "other", seed=3, target_modules=["up_proj"])
    case.merge(tmp_path / "one.gguf", output_format="same")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorafold.LorafoldWarning)
        lorafold.merge(tmp_path / "one.gguf", [other], tmp_path / "two.gguf", output_format="same", undo=tmp_path / "u.safetensors")
    receipt = lorafold.inspect(tmp_path / "two.gguf").details["receipt"]
    assert [adapter["name"] for adapter in receipt["adapters"]] == ["adapter", "other"]
    assert lorafold.verify(tmp_path / "two.gguf", tmp_path / "one.gguf", [other]).ok
    assert len([key for key in gguf.GGUFReader(tmp_path / "two.gguf").fields if key == "lorafold.receipt"]) == 1
    with pytest.raises(lorafold.errors.AlreadyMergedError):
        lorafold.plan(tmp_path / "two.gguf", [case.adapter], output_format="same")
    lorafold.unmerge(tmp_path / "two.gguf", tmp_path / "back.gguf", undo=tmp_path / "u.safetensors")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_split_files_become_one(case: Case, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", case.tensors, case.kinds, split=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    case.merge(tmp_path / "whole.gguf", output_format="same")
    outs = []
    for part in parts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorafold.LorafoldWarning)
            lorafold.merge(part, [case.adapter], tmp_path / "out.gguf", output_format="same", overwrite=True,
                           undo=tmp_path / "undo.safetensors")  # fmt: skip
        outs.append(raw_tensors([tmp_path / "out.gguf"]))
    assert outs[0] == outs[1] == outs[2] == raw_tensors([tmp_path / "whole.gguf"])
    assert not [key for key in gguf.GGUFReader(tmp_path / "out.gguf").fields if key.startswith("split.")]
    assert lorafold.verify(tmp_path / "out.gguf", parts[1], [case.adapter]).ok
    for source in ({"base": parts[0]}, {"undo": tmp_path / "undo.safetensors"}):
        lorafold.unmerge(tmp_path / "out.gguf", tmp_path / "back", overwrite=True, **source)
        assert all((tmp_path / "back" / part.name).read_bytes() == part.read_bytes() for part in parts)
        shutil.rmtree(tmp_path / "back")
        with pytest.raises(OutputError, match=r"is 3 files|would be 3 files"):
            lorafold.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf", **source)
    os.rename(parts[1], tmp_path / "aside")
    with pytest.raises(CheckpointError, match=r"is one of 3 parts of a model, and m-00002-of-00003\.gguf is missing"):
        lorafold.plan(parts[0], [case.adapter], output_format="same")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(
        CheckpointError, match=r"m-00002-of-00003.gguf says that it is part 2 of 3, counted from 0; by its name .* part 1"
    ):
        lorafold.plan(parts[0], [case.adapter], output_format="same")
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match="by its name it is a whole model"):
        lorafold.plan(tmp_path / "alone.gguf", [case.adapter], output_format="same")


def test_what_lies_between_tensors(case: Case, tmp_path: Path) -> None:
    """Another alignment is kept. Bytes of no tensor that are not zeros go, which is refused where an undo file must give them."""
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_custom_alignment(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for name, array in case.tensors.items():
        writer.add_tensor(name, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "out.gguf", undo=tmp_path / "u")
    header = read_gguf_header(tmp_path / "out.gguf")
    assert header.alignment == 128
    assert all(info.start % 128 == 0 for info in header.tensors.values())
    assert lorafold.verify(tmp_path / "out.gguf", tmp_path / "base.gguf", [case.adapter]).ok
    lorafold.unmerge(tmp_path / "out.gguf", tmp_path / "back.gguf", undo=tmp_path / "u")
    assert (tmp_path / "back.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()
    raw = bytearray((tmp_path / "base.gguf").read_bytes())
    raw[gaps(read_gguf_header(tmp_path / "base.gguf"))[0][0]] = 7
    (tmp_path / "base.gguf").write_bytes(raw)
    with pytest.raises(PlanError, match="bytes that are of no tensor and not zeros"):
        lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "two.gguf", undo=tmp_path / "u2")
    assert not (tmp_path / "two.gguf").exists()
    lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "two.gguf")
    assert raw_tensors([tmp_path / "two.gguf"]) == raw_tensors([tmp_path / "out.gguf"])


def test_a_base_in_gguf_says_what_a_conversion_needs(case: Case, tmp_path: Path) -> None:
    lorafold.convert(case.adapter, tmp_path / "one.gguf", "gguf", base=case.base)
    lorafold.convert(case.adapter, tmp_path / "two.gguf", "gguf", base=save_config(tmp_path / "hf"))
    assert raw_tensors([tmp_path / "one.gguf"]) == raw_tensors([tmp_path / "two.gguf"])
    case.merge(tmp_path / "out.gguf", output_format="same")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorafold.LorafoldWarning)
        lorafold.merge(case.base, [tmp_path / "one.gguf"], tmp_path / "other.gguf", output_format="same")
    assert raw_tensors([tmp_path / "out.gguf"]) == raw_tensors([tmp_path / "other.gguf"])
    assert lorafold.inspect(tmp_path / "one.gguf", case.base).kind == "adapter"


def test_types_that_are_not_decoded_are_copied_or_refused_by_name(case: Case, tmp_path: Path) -> None:
    """IQ4_XS on what the adapter leaves alone is copied, byte for byte; on what it changes it is an error that says so."""
    tensors = tensors_of(tiny(), "llama")
    number = gguf.GGMLQuantizationType.IQ4_XS
    words = np.random.default_rng(0).integers(0, 256, (512, gguf.GGML_QUANT_SIZES[number][1]), dtype=np.uint8)

    def base(at: str, rows: int) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        for name, array in tensors.items():
            if name == at:
                writer.add_tensor(name, words[:rows], raw_dtype=number)
            elif array.ndim > 1:
                writer.add_tensor(name, blocks(array, "Q8_0", 0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, array.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "base.gguf"

    path = base("blk.0.ffn_up.weight", 512)
    lorafold.merge(path, [case.adapter], tmp_path / "out.gguf", output_format="same")
    assert raw_tensors([tmp_path / "out.gguf"])["blk.0.ffn_up.weight"] == words.tobytes()
    assert lorafold.verify(tmp_path / "out.gguf", path, [case.adapter]).ok
    assert lorafold.inspect(path).details["parameters_by_dtype"]["IQ4_XS"] == 512 * 256
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' is of type IQ4_XS"):
        lorafold.merge(path, [case.adapter], tmp_path / "no.gguf", output_format="bf16")
    path = base("blk.0.attn_v.weight", 128)
    with pytest.raises(
        CheckpointError, match=r"base.gguf: tensor 'blk.0.attn_v.weight' is of ggml's type IQ4_XS, which is not decoded"
    ):
        lorafold.merge(path, [case.adapter], tmp_path / "no.gguf", output_format="same")
    assert not (tmp_path / "no.gguf").exists()


def test_outputs_are_files_that_end_so(case: Case, tmp_path: Path) -> None:
    def refused(out: Path, kind: type[LorafoldError], words: str, **options: object) -> None:
        with pytest.raises(kind, match=words):
            lorafold.merge(case.base, [case.adapter], out, output_format="same", **options)
        assert {each.name for each in tmp_path.iterdir()} <= {"there.gguf", "folder.gguf", "base.safetensors"}

    refused(tmp_path / "out", OutputError, "merged into one file, whose name ends in .gguf")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    refused(tmp_path / "there.gguf", OutputExistsError, "there.gguf exists")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "folder.gguf", OutputExistsError, "is not a file", overwrite=True)
    refused(case.base, OutputError, "it is the input", overwrite=True)
    refused(tmp_path / "o.gguf", PlanError, "is one file", max_shard_size="1GB")
    refused(tmp_path / "o.gguf", PlanError, "of changed tensors alone", only_changed=True)
    refused(tmp_path / "o.gguf", PlanError, "GGUF itself tells what is tied", tied_head="none")
    case.merge(tmp_path / "there.gguf", output_format="same", overwrite=True)
    assert lorafold.verify(tmp_path / "there.gguf").ok
    lorafold.convert(case.adapter, tmp_path / "a.gguf", "gguf", base=save_config(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=r"is not a model: its general.type is 'adapter'"):
        lorafold.plan(tmp_path / "a.gguf", [case.adapter])
    with pytest.raises(lorafold.errors.AdapterError, match="a base model comes first, adapters after"):
        lorafold.plan(case.base, [case.base])


def save_config(folder: Path) -> Path:
    tiny().save_pretrained(folder)
    return folder


def test_each_adapter_alone(case: Case, tmp_path: Path) -> None:
    other = save_adapter(tiny(), tmp_path / "other", seed=3, target_modules=["up_proj"])
    (tmp_path / "outs").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorafold.LorafoldWarning)
        lorafold.merge_each(case.base, [case.adapter, other], tmp_path / "outs", output_format="same")
    case.merge(tmp_path / "one.gguf", output_format="same")
    assert {each.name for each in (tmp_path / "outs").iterdir()} == {"adapter.gguf", "other.gguf"}
    assert (tmp_path / "outs" / "adapter.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_a_plan_can_be_stored_and_run(case: Case, tmp_path: Path) -> None:
    plan = lorafold.plan(case.base, [case.adapter], output_format="bf16")
    lorafold.run(plan.to_json(), tmp_path / "out.gguf")
    case.merge(tmp_path / "other.gguf", output_format="bf16")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_transformers_loads_what_is_written(case: Case, tmp_path: Path) -> None:
    """Logits of the merged file in transformers are those of PEFT on the base as transformers reads it."""
    import peft
    import transformers

    write_gguf(tmp_path / "base.gguf", tensors_of(tiny(), "llama"), "Q8_0")
    report = lorafold.merge(tmp_path / "base.gguf", [case.adapter], tmp_path / "out.gguf", output_format="fp32")
    assert report.kept_in_all > 0.99
    tokens = torch.tensor([[1, 5, 9, 20, 33, 7]])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        load = transformers.LlamaForCausalLM.from_pretrained
        merged = load(tmp_path, gguf_file="out.gguf", dtype=torch.float32).eval()
        plain = load(tmp_path, gguf_file="base.gguf", dtype=torch.float32).eval()
        before = plain(tokens).logits
        wrapped = peft.PeftModel.from_pretrained(plain, case.adapter).eval()
        wanted, found = wrapped(tokens).logits, merged(tokens).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)  # float32 in another order of sums: 256 terms of 2^-24 each, twice
    assert (wanted - before).abs().max() > 0.1


def test_a_merge_that_was_stopped_is_gone_on_with(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole when the receipt is put into it; stopped there, the next run has its tensors already."""
    from lorafold.engine import merge_outputs

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merge_outputs, "put_receipt", stop)
        with pytest.raises(KeyboardInterrupt):
            case.merge(tmp_path / "out.gguf", output_format="same")
    assert not (tmp_path / "out.gguf").exists()
    report = case.merge(tmp_path / "out.gguf", output_format="same")
    assert any("1 of 1 files were finished" in note for note in report.notes)
    assert os.listdir(tmp_path) == ["out.gguf"]
    case.merge(tmp_path / "other.gguf", output_format="same")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_base_is_an_error_or_another_model(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever bytes of the header are changed: an error that has a name, or a plan."""
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        folder.mkdir()
        write_gguf(folder / "whole.gguf", tensors_of(tiny(), "llama"), "Q8_0")
        save_adapter(tiny(), folder / "adapter", target_modules=["v_proj"])
    raw, end = bytearray((folder / "whole.gguf").read_bytes()), read_gguf_header(folder / "whole.gguf").data_start
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw)))) :]
    (folder / "base.gguf").write_bytes(raw)
    with contextlib.suppress(InputError, OutputError):
        lorafold.plan(folder / "base.gguf", [folder / "adapter"], output_format="same")


def test_outputs_that_appeared_before_a_stop_are_left(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several adapters' outputs, those that are in their places when the command is run again are known by their receipts."""
    from lorafold.engine.undofile.session import Undoing

    other = save_adapter(tiny(), tmp_path / "other", seed=3, target_modules=["up_proj"])
    (tmp_path / "outs").mkdir()
    commit, done = Undoing.commit, []

    def once(self: Undoing) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(self)
        commit(self)

    def each() -> list[lorafold.MergeReport]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lorafold.LorafoldWarning)
            return lorafold.merge_each(case.base, [case.adapter, other], tmp_path / "outs", output_format="same")

    with monkeypatch.context() as patch:
        patch.setattr(Undoing, "commit", once)
        with pytest.raises(KeyboardInterrupt):
            each()
    first = (tmp_path / "outs" / "adapter.gguf").stat().st_mtime_ns
    reports = each()
    assert any("was in its place already" in note for note in reports[0].notes)
    assert (tmp_path / "outs" / "adapter.gguf").stat().st_mtime_ns == first
    assert sorted(os.listdir(tmp_path / "outs")) == ["adapter.gguf", "other.gguf"]
    assert lorafold.verify(tmp_path / "outs" / "other.gguf", case.base, [other]).ok

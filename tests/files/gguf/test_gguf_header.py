"""The header of a GGUF file: what the gguf package writes is read, and damage is a typed error."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.adapters.formats.gguf.writer import gguf_bytes
from lorafold.errors import AdapterError, CheckpointError, InputError
from lorafold.files.gguf.ggml_types import GGML_TYPES
from lorafold.files.gguf.gguf_header import RECEIPT_KEY, blanked, read_gguf_header
from lorafold.files.gguf.gguf_layout import gaps
from lorafold.files.safetensors.reader import TensorFile


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_the_gguf_package_writes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("n", data.draw(st.integers(0, 2**32 - 1)))
    writer.add_bool("yes", True)
    writer.add_array("words", data.draw(st.lists(st.text(max_size=5), min_size=1, max_size=3)))
    writer.add_array("counts", [1, 2, 3])
    if data.draw(st.booleans()):
        writer.add_custom_alignment(data.draw(st.sampled_from([8, 64])))
    held = {}
    for i in range(data.draw(st.integers(1, 3))):
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        held[f"t{i}"] = np.random.default_rng(i).normal(size=shape).astype(data.draw(st.sampled_from([np.float32, np.float16])))
        writer.add_tensor(f"t{i}", held[f"t{i}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["counts"] == "[3]"
    with TensorFile(header) as file:
        for name, array in held.items():
            assert torch.equal(file.read(header.tensors[name]), torch.from_numpy(array)), name


WHOLE = gguf_bytes(
    {"general.type": "adapter", "adapter.lora.alpha": 2.0, "general.name": "x"},
    {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5).half(), "c": torch.ones(2, 2).bfloat16()},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(WHOLE)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [(t.name, list(t.shape)) for t in reader.tensors] == [("a", [3, 2]), ("b", [5]), ("c", [2, 2])]
    header = read_gguf_header(tmp_path / "a.gguf")
    assert header.metadata == {"general.type": "adapter", "adapter.lora.alpha": "2.0", "general.name": "x"}
    assert [(info.name, info.dtype, info.shape) for info in header.tensors.values()] == [
        ("a", "F32", (2, 3)), ("b", "F16", (5,)), ("c", "BF16", (2, 2))
    ]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_stays_within_the_file(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    raw = bytearray(WHOLE)
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    else:
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path.write_bytes(raw)
    try:
        header = read_gguf_header(path)
    except InputError:
        return
    assert all(header.data_start <= info.start <= info.stop <= len(raw) for info in header.tensors.values())


def test_what_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"

    def refused(raw: bytes, words: str, kind: type[InputError] = CheckpointError) -> None:
        path.write_bytes(raw)
        with pytest.raises(kind, match=words):
            read_gguf_header(path, error=kind)

    refused(b"GGUF" + struct.pack("<I", 1) + WHOLE[8:], "GGUF of version 1")
    refused(b"GGUF" + struct.pack(">I", 3) + WHOLE[8:], "little-endian")
    refused(WHOLE[:40], "is said to hold 3 tensors, more than fit", AdapterError)
    refused(WHOLE[:120], "ends within its header")
    refused(WHOLE.replace(b"general.name", b"general.type"), "'general.type' stands twice")
    refused(WHOLE[:8] + struct.pack("<Q", 1 << 60) + WHOLE[16:], "is said to hold")
    refused(WHOLE[:16] + struct.pack("<Q", 1 << 20) + WHOLE[24:], "is said to hold 1048576 key-value pairs")
    name = WHOLE.index(struct.pack("<Q", 1) + b"a")
    shape, offset = name + 13, name + 33
    refused(WHOLE[:shape] + struct.pack("<QQ", 1 << 62, 1 << 62) + WHOLE[shape + 16 :], "more elements than can be addressed")
    refused(WHOLE[: offset - 4] + struct.pack("<I", 12) + WHOLE[offset:], "of type Q4_K has rows of 3, expected blocks of 256")
    refused(WHOLE[: offset - 4] + struct.pack("<I", 4) + WHOLE[offset:], "ggml's type 4, which is not known")
    refused(WHOLE[:offset] + struct.pack("<Q", 1 << 40) + WHOLE[offset + 8 :], "which the file of")
    refused(WHOLE[:offset] + struct.pack("<Q", 7) + WHOLE[offset + 8 :], "which the file of")
    refused(WHOLE[:offset] + struct.pack("<Q", 32) + WHOLE[offset + 8 :], "overlaps the one before it")


@pytest.mark.parametrize("kind", [each for each in GGML_TYPES if GGML_TYPES[each].numel > 1])
def test_types_are_ggmls(tmp_path: Path, kind: int) -> None:
    """Names and sizes of all types, and where their tensors lie, are those of the gguf package."""
    theirs = gguf.GGMLQuantizationType(kind)
    assert (theirs.name, *gguf.GGML_QUANT_SIZES[theirs]) == GGML_TYPES[kind]
    words = np.random.default_rng(kind).integers(0, 256, (3, 2 * GGML_TYPES[kind].nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("first", np.ones(5, np.float32))
    writer.add_tensor("t", words, raw_dtype=theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "q.gguf")
    info = header.tensors["t"]
    assert (info.dtype, info.shape) == (theirs.name, (3, 2 * GGML_TYPES[kind].numel))
    assert (tmp_path / "q.gguf").read_bytes()[info.start : info.stop] == words.tobytes()


def test_all_types_of_the_gguf_package_are_known() -> None:
    assert {int(kind) for kind in gguf.GGML_QUANT_SIZES} == GGML_TYPES.keys()


def test_what_is_laid_out_is_what_the_gguf_package_writes(tmp_path: Path) -> None:
    """Byte for byte, where the pairs and tensors are the same."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_name("x")
    held = {"b": np.arange(3, dtype=np.float32), "a": np.ones((2, 5), np.float16)}
    for name, array in held.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pairs = {"general.architecture": "llama", "general.name": "x"}
    assert gguf_bytes(pairs, {name: torch.from_numpy(each) for name, each in held.items()}) == (tmp_path / "a.gguf").read_bytes()
    header = read_gguf_header(tmp_path / "a.gguf")
    assert gaps(header) == [(header.tensors["b"].stop, header.tensors["a"].start), (header.tensors["a"].stop, header.file_size)]


def test_the_text_of_a_receipt_is_blank_to_hashes(tmp_path: Path) -> None:
    tensors = {"t": torch.ones(3)}
    for i, text in enumerate(("    ", "abcd", "abcde")):
        (tmp_path / f"{i}.gguf").write_bytes(gguf_bytes({"general.name": "x", RECEIPT_KEY: text}, tensors))
    headers = [read_gguf_header(tmp_path / f"{i}.gguf") for i in range(3)]
    raw = (tmp_path / "1.gguf").read_bytes()
    low, high = headers[1].blank or (0, 0)
    assert raw[low:high] == b"abcd"
    assert headers[0].sha256 == headers[1].sha256 != headers[2].sha256
    assert headers[0].sha256 == hashlib.sha256((tmp_path / "0.gguf").read_bytes()[: headers[0].data_start]).hexdigest()
    for start in (0, low - 3, low + 1, high - 1, high + 2):
        view = memoryview(bytearray(raw[start:]))
        blanked(headers[1], start, view)
        assert bytes(view) == (tmp_path / "0.gguf").read_bytes()[start:]

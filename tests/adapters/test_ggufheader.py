"""The header of a GGUF file: what the gguf package writes is read, and damage is a typed error."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.adapters.formats.gguf.header import read_gguf_header
from lorafold.adapters.formats.gguf.writer import gguf_bytes
from lorafold.errors import AdapterError, InputError, UnsupportedAdapterError
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

    def refused(raw: bytes, kind: type[InputError], words: str) -> None:
        path.write_bytes(raw)
        with pytest.raises(kind, match=words):
            read_gguf_header(path)

    refused(b"GGUF" + struct.pack("<I", 1) + WHOLE[8:], UnsupportedAdapterError, "GGUF of version 1")
    refused(b"GGUF" + struct.pack(">I", 3) + WHOLE[8:], UnsupportedAdapterError, "little-endian")
    refused(WHOLE[:40], AdapterError, "ends within its header")
    refused(WHOLE.replace(b"general.name", b"general.type"), AdapterError, "'general.type' stands twice")
    refused(WHOLE[:8] + struct.pack("<Q", 1 << 60) + WHOLE[16:], AdapterError, "is said to hold")
    quantised = tmp_path / "q.gguf"
    writer = gguf.GGUFWriter(quantised, "llama")
    writer.add_tensor("t", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedAdapterError, match="'t' is of ggml's type 8, expected F32, F16 or BF16"):
        read_gguf_header(quantised)

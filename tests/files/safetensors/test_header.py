"""Headers: whatever the reference reader refuses or reads differently is refused here, with the file's name."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorafold.errors import CheckpointError
from lorafold.files.safetensors.header import read_header
from lorafold.files.safetensors.info import BITS, Header


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int = 0, stop: int = 4, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def content(header: Header) -> dict[str, tuple[str, list[int], bytes]]:
    data = header.path.read_bytes()
    return {name: (info.dtype, list(info.shape), data[info.start : info.stop]) for name, info in header.tensors.items()}


def reference(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in safetensors.deserialize(path.read_bytes())}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "b": torch.randn(3, 4).bfloat16(),
        "a": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert content(header) == reference(path)
    assert header.metadata == {"format": "pt"}
    assert header.file_size == path.stat().st_size
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)
    assert {name: info.torch_dtype for name, info in header.tensors.items()} == {n: t.dtype for n, t in tensors.items()}
    assert sum(info.nbytes for info in header.tensors.values()) == header.file_size - header.data_start


_SAMPLE = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a.w": entry(0, 8, "BF16", [2, 2]),
        "b": entry(8, 8, "F32", [0]),
        "c": entry(8, 11, "U8", [3]),
    }
).encode()
_FILE = struct.pack("<Q", len(_SAMPLE)) + _SAMPLE + bytes(range(11))


@given(st.integers(0, 8 + len(_SAMPLE) - 1), st.integers(0, 255))
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_changed_byte_is_refused_or_read_as_the_reference_reads_it(tmp_path: Path, at: int, byte: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(_FILE[:at] + bytes([byte]) + _FILE[at + 1 :])
    header, refusal = None, ""
    try:
        header = read_header(path)
    except CheckpointError as error:
        refusal = str(error)
    if header is None:
        assert "m.safetensors" in refusal
    elif all(info.dtype in BITS for info in header.tensors.values()):  # types that are unknown can still be copied
        assert content(header) == reference(path)


@given(st.integers(0, len(_FILE) + 20))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_row_24_any_other_length_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((_FILE + bytes(20))[:length])
    if length == len(_FILE):
        read_header(path)
        return
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        read_header(path)


def test_row_24_truncated_and_trailing_name_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for data, what in ((_FILE[:-1], "truncated"), (_FILE + b"x", "longer")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{what}.*expected {len(_FILE)} bytes, found {len(data)}"):
            read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "'b' overlaps the one before it: it begins at offset 2, expected 4"),
        ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "'b' leaves a hole before it: it begins at offset 6, expected 4"),
        ({"a": entry(4, 8)}, 8, "'a' leaves a hole"),
        ({"a": entry(4, 0)}, 4, "two rising byte offsets, found [4, 0]"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, 4, "two rising byte offsets"),
        ({"a": entry(-4, 0)}, 4, "two rising byte offsets"),
        ({"a": entry(0, 2**64)}, 4, "two rising byte offsets"),
        ({"a": entry(0, 1, "F4", [1])}, 1, "do not end on a whole byte"),
        ({"a": entry(0, 3, "F6_E2M3", [3])}, 3, "do not end on a whole byte"),
        ({"a": entry(0, 4), "z": entry(2, 2, shape=[0]), "b": entry(4, 8)}, 8, "'z' overlaps"),
    ],
)
def test_row_34_overlaps_holes_and_bad_offsets(tmp_path: Path, header: Any, data: int, says: str) -> None:
    path = write(tmp_path / "m.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([2**40, 2**40], "more elements than can be addressed"),
        ([2**63], "shape must be a list of numbers"),
        ([2**62, 2, 0], "more elements"),
        ([-1], "shape must be a list of numbers"),
        ([1.0], "shape must be a list of numbers"),
        ([True], "shape must be a list of numbers"),
        ("1", "shape must be a list of numbers"),
        ([2], "[2] of F32 takes 8 bytes, data_offsets give it 4"),
    ],
)
def test_row_33_shapes_that_cannot_be(tmp_path: Path, shape: Any, says: str) -> None:
    path = write(tmp_path / "m.safetensors", {"a": entry(shape=shape)}, bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert says in str(caught.value)


def test_row_33_a_huge_tensor_without_elements_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"a": entry(0, 0, shape=[0, 2**40, 2**40])})
    assert read_header(path).tensors["a"].nbytes == 0


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_row_31_a_name_twice(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(CheckpointError, match="stands twice"):
        read_header(write(tmp_path / "m.safetensors", header, bytes(4)))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 1000])
def test_row_32_a_length_beyond_the_file_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "m.safetensors", {}, length=length)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="header is said to"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bomb", [b'{"":0},' * 600_000, b"[]," * 1_100_000, b"1," * 8_100_000], ids=["objects", "lists", "numbers"])
def test_row_32_too_many_values_are_refused_before_they_are_parsed(tmp_path: Path, bomb: bytes) -> None:
    path = write(tmp_path / "m.safetensors", b'{"a":[' + bomb + b"0]}")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than the 500000 tensors"):
            read_header(path)
        # the header itself, twice while it is put together
        assert tracemalloc.get_traced_memory()[1] < 2 * len(bomb) + 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "begins with b'['"),
        (b" {}", "begins with b' '"),
        (b"{", "not JSON"),
        (b"{}\0", "not JSON"),
        (b'{"a\xff":1}', "not UTF-8"),
        ({"a": ["F32", [1], [0, 4]]}, "must have dtype, shape and data_offsets, found a list"),
        ({"a": {"dtype": "F32"}}, "must have dtype, shape and data_offsets, found dtype"),
        ({"a": entry() | {"more": 1}}, "found data_offsets, dtype, more, shape"),
        ({"a": entry(dtype=7)}, "dtype must be text, not a number"),
        ({"a": None}, "found null"),
        (b'{"a":' * 99_999, "nested too deeply"),
    ],
)
def test_headers_of_another_form(tmp_path: Path, header: Any, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(write(tmp_path / "m.safetensors", header, bytes(4)))
    assert says in str(caught.value)


@pytest.mark.parametrize("dtype", ["F4", "F6_E3M2", "F8_E8M0", "C64", "X17", "F9\x1b[31m"])
def test_row_35_types_that_torch_lacks_are_accepted(tmp_path: Path, dtype: str) -> None:
    bits = BITS.get(dtype, 24)
    header = read_header(write(tmp_path / "m.safetensors", {"a": entry(0, bits, dtype, [8])}, bytes(bits)))
    assert (header.tensors["a"].dtype, header.tensors["a"].nbytes) == (dtype, bits)


def test_row_38_metadata_that_is_not_text(tmp_path: Path) -> None:
    for metadata in ({"a": 1}, [], "x", {"a": {"b": "c"}}):
        with pytest.raises(CheckpointError, match="__metadata__ must map text to text"):
            read_header(write(tmp_path / "m.safetensors", {"__metadata__": metadata}))
    assert read_header(write(tmp_path / "m.safetensors", {"__metadata__": None})).metadata == {}


def test_row_37_control_characters_are_escaped_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "m\x1b[31m.safetensors", {"a\x1b[2J\n": entry(0, 3)}, bytes(3))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\\x1b[2J" in str(caught.value)


def test_row_22_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    for path in (tmp_path / "fifo.safetensors", tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError):
            read_header(path)


def test_the_hash_is_of_the_header_alone(tmp_path: Path) -> None:
    one = read_header(write(tmp_path / "1.safetensors", {"a": entry()}, b"1234"))
    two = read_header(write(tmp_path / "2.safetensors", {"a": entry()}, b"5678"))
    other = read_header(write(tmp_path / "3.safetensors", {"b": entry()}, b"1234"))
    assert one.sha256 == two.sha256 != other.sha256
    assert one.identity != two.identity

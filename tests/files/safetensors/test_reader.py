"""Reading by position: the same tensors as the reference, and errors, not signals, where the file changes underneath."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorafold.errors import CheckpointError
from lorafold.files.safetensors.buffers import tensor_over
from lorafold.files.safetensors.header import read_header
from lorafold.files.safetensors.info import TORCH_DTYPES, Header
from lorafold.files.safetensors.reader import TensorFile

_WRITABLE = [name for name in TORCH_DTYPES if name != "F8_E8M0"]


@pytest.fixture
def sample(tmp_path: Path) -> Header:
    path = tmp_path / "m.safetensors"
    save_file(
        {
            "a": torch.randn(5, 4).bfloat16(),
            "b": torch.arange(7, dtype=torch.uint8),
            "empty": torch.zeros(0, 3),
            "hollow": torch.zeros(3, 0),
            "scalar": torch.tensor(2.5),
            "cube": torch.randn(3, 2, 2, dtype=torch.float64),
        },
        path,
    )
    return read_header(path)


@pytest.mark.parametrize("name", _WRITABLE)
def test_every_type_reads_as_the_reference_reads_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    dtype = TORCH_DTYPES[name]
    raw = bytes(range(48)) if dtype != torch.bool else bytes(i % 2 for i in range(48))
    save_file({"a": tensor_over(bytearray(raw), dtype, (48 // dtype.itemsize,))}, path)
    header = read_header(path)
    with TensorFile(header) as file:
        tensor = file.read(header.tensors["a"])
    expected = load_file(path)["a"]
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_rows_are_slices_of_the_whole(sample: Header, data: st.DataObject) -> None:
    whole = load_file(sample.path)
    info = data.draw(st.sampled_from([i for i in sample.tensors.values() if i.shape]))
    start = data.draw(st.integers(0, info.shape[0]))
    count = data.draw(st.integers(0, info.shape[0] - start))
    make = data.draw(st.sampled_from([lambda: None, lambda: bytearray(200), lambda: memoryview(bytearray(240))]))
    with TensorFile(sample) as file:
        rows = file.read_rows(info, start, count, buffer=make())
    assert torch.equal(rows, whole[info.name][start : start + count])
    assert rows.shape == whole[info.name][start : start + count].shape


def test_a_scalar_is_one_row(sample: Header) -> None:
    with TensorFile(sample) as file:
        assert file.read_rows(sample.tensors["scalar"], 0, 1).item() == file.read(sample.tensors["scalar"]).item() == 2.5
        assert file.read(sample.tensors["scalar"]).shape == ()


def test_a_buffer_is_read_into_and_shared(sample: Header) -> None:
    buffer = bytearray(1000)
    with TensorFile(sample) as file:
        tensor = file.read(sample.tensors["b"], buffer=buffer)
        assert bytes(buffer[:7]) == bytes(range(7))
        buffer[0] = 9
        assert tensor[0].item() == 9
        tensor[1] = 8
        assert buffer[1] == 8
        with pytest.raises(CheckpointError, match="cannot be held"):
            file.read(sample.tensors["cube"], buffer=bytearray(8))


def test_rows_that_are_not_there_are_refused(sample: Header) -> None:
    with TensorFile(sample) as file:
        for start, count in ((0, 6), (-1, 2), (5, 1), (0, -1)):
            with pytest.raises(CheckpointError, match="'a' has 5 rows"):
                file.read_rows(sample.tensors["a"], start, count)


def test_several_threads_read_at_once(sample: Header) -> None:
    whole = load_file(sample.path)
    with TensorFile(sample) as file, ThreadPoolExecutor(4) as pool:
        infos = [info for info in sample.tensors.values() if info.nbytes] * 50
        for info, tensor in zip(infos, pool.map(file.read, infos), strict=True):
            assert torch.equal(tensor, whole[info.name])


def test_reads_that_come_in_pieces_are_put_together(sample: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, preadv = load_file(sample.path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    with TensorFile(sample) as file:
        assert torch.equal(file.read(sample.tensors["a"]), whole["a"])


def test_row_25_a_file_truncated_while_it_is_read(sample: Header) -> None:
    last = list(sample.tensors.values())[-1]
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match=f"truncated while it was read: it ends at byte {last.start + 1}"),
        TensorFile(sample) as file,
    ):
        os.truncate(sample.path, last.start + 1)
        file.read(last)


def test_row_44_a_read_that_the_disk_refuses(sample: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with TensorFile(sample) as file:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"m\.safetensors cannot be read at byte \d+: Input/output error"):
            file.read(sample.tensors["a"])


def test_row_26_a_file_changed_since_its_header_was_read(sample: Header) -> None:
    data = sample.path.read_bytes()

    def append() -> None:
        sample.path.write_bytes(data + b"x")

    def replace() -> None:
        other = sample.path.with_name("other")
        other.write_bytes(data)
        os.replace(other, sample.path)

    def touch() -> None:
        os.utime(sample.path, ns=(0, 12345))

    for change, what in ((append, "size"), (replace, "inode"), (touch, "mtime_ns")):
        header = read_header(sample.path)
        change()
        with pytest.raises(CheckpointError, match=f"has changed since its header was read: its {what}"), TensorFile(header):
            pass
        sample.path.write_bytes(data)


def test_row_26_a_file_changed_in_between(sample: Header) -> None:
    with pytest.raises(CheckpointError, match="mtime_ns"), TensorFile(sample) as file:  # noqa: PT012
        file.read(sample.tensors["a"])
        os.utime(sample.path, ns=(0, 12345))


def test_row_26_a_file_that_is_gone(sample: Header) -> None:
    sample.path.unlink()
    with pytest.raises(CheckpointError, match="no such file"), TensorFile(sample):
        pass


def test_row_35_a_type_that_torch_lacks_cannot_be_computed_with(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    header = read_header(path)
    with TensorFile(header) as file, pytest.raises(CheckpointError, match="'a' is of type F4, which torch"):
        file.read(header.tensors["a"])


def test_row_33_an_empty_tensor_of_impossible_strides_is_a_typed_error(tmp_path: Path) -> None:
    text = b'{"a":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    header = read_header(path)
    with TensorFile(header) as file, pytest.raises(CheckpointError, match="cannot be held"):
        file.read(header.tensors["a"])


def test_leaving_closes_the_descriptor(sample: Header) -> None:
    with TensorFile(sample) as file:
        fd = file.fileno()
    with pytest.raises(OSError):
        os.fstat(fd)
    os.utime(sample.path, ns=(0, 0))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError), TensorFile(sample):
        pass
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_written_may_change_until_its_end_is_read(tmp_path: Path, sample: Header) -> None:
    asked: list[int] = []
    with TensorFile(sample, until=asked.append) as file:
        for offset in (0, 8):
            os.utime(sample.path, ns=(0, offset))
            file.read_into(offset, memoryview(bytearray(8)))
        os.utime(sample.path, ns=(0, 1))
        file.read_into(sample.file_size - 4, memoryview(bytearray(4)))
    assert asked == [8, 16, sample.file_size]
    with pytest.raises(CheckpointError, match="its mtime_ns was"), TensorFile(sample, until=asked.append) as file:  # noqa: PT012
        file.read_into(sample.file_size - 4, memoryview(bytearray(4)))
        os.utime(sample.path, ns=(0, 2))
    with pytest.raises(CheckpointError, match="its size was"), TensorFile(sample, until=asked.append):
        os.truncate(sample.path, sample.file_size + 1)


def test_what_never_comes_is_not_read(sample: Header) -> None:
    def never(offset: int) -> None:
        raise InterruptedError(offset)

    with pytest.raises(InterruptedError), TensorFile(sample, until=never) as file:
        file.read(sample.tensors["a"])

"""A file whose head is written last is one that safetensors reads, whatever its tensors came to."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lorafold.errors import OutputError
from lorafold.files.safetensors.growing import GrowingWriter
from lorafold.files.safetensors.header import read_header
from lorafold.files.safetensors.info import TensorSpec

FIXED = [TensorSpec("wide", "I64", (2, 3), 48), TensorSpec("empty", "F32", (0,), 0), TensorSpec("text", "U8", (5,), 5)]


def opened(folder: str | Path) -> tuple[int, Path]:
    path = Path(folder, "f.safetensors")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.binary(max_size=40), max_size=4), max_size=4), st.text(max_size=30))
def test_what_is_appended_is_what_is_read(parts: list[list[bytes]], remark: str) -> None:
    with TemporaryDirectory() as folder:
        fd, path = opened(folder)
        growing = [(f"grown/{i}", 10**9) for i in range(len(parts))]
        writer = GrowingWriter(fd, path, FIXED, growing, {"format": "pt", "said": remark})
        writer.write("text", 3, memoryview(b"lo"))
        for (name, _), several in zip(growing, parts, strict=True):
            for part in several:
                writer.append(name, memoryview(part))
        writer.write("text", 0, memoryview(b"hel"))
        writer.write("wide", 0, memoryview(np.arange(6, dtype=np.int64)).cast("B"))
        assert writer.finish({"format": "pt", "said": remark}) == path.stat().st_size
        os.close(fd)
        with safe_open(path, "np") as found:
            assert found.metadata() == {"format": "pt", "said": remark}
            assert found.get_tensor("wide").tolist() == [[0, 1, 2], [3, 4, 5]]
            assert bytes(found.get_tensor("text")) == b"hello"
            for (name, _), several in zip(growing, parts, strict=True):
                assert bytes(found.get_tensor(name)) == b"".join(several)
        assert read_header(path).data_start % 8 == 0


def test_until_it_is_finished_it_is_no_safetensors_file(tmp_path: Path) -> None:
    from lorafold.errors import CheckpointError

    fd, path = opened(tmp_path)
    writer = GrowingWriter(fd, path, FIXED[1:], [("a", 10)], {})
    writer.append("a", memoryview(b"x"))
    with pytest.raises(CheckpointError):
        read_header(path)
    with pytest.raises(OutputError, match="'text' is not complete"):
        writer.finish({})
    writer.write("text", 0, memoryview(b"hello"))
    with pytest.raises(OutputError, match="has no room"):
        writer.write("text", 2, memoryview(b"llo"))
    with pytest.raises(OutputError, match="room was kept"):
        writer.finish({"said": "x" * 100})
    writer.finish({})
    os.close(fd)
    assert read_header(path).tensors["a"].nbytes == 1


def test_tensors_grow_one_after_the_other(tmp_path: Path) -> None:
    fd, path = opened(tmp_path)
    writer = GrowingWriter(fd, path, (), [("a", 10), ("b", 10)], {})
    writer.append("b", memoryview(b"x"))
    with pytest.raises(OutputError, match="'a' was finished before"):
        writer.append("a", memoryview(b"x"))
    os.close(fd)

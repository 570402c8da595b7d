"""Files written piece by piece read back equal; incomplete or refused ones never pass for done."""

from __future__ import annotations

import errno
import os
import random
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafold.errors import CheckpointError, OutputError
from lorafold.files.safetensors.buffers import bytes_of
from lorafold.files.safetensors.header import read_header
from lorafold.files.safetensors.info import BITS, Header, TensorInfo
from lorafold.files.safetensors.reader import TensorFile
from lorafold.files.safetensors.writer import ShardWriter

_SPECS = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from([name for name in sorted(BITS) if BITS[name] >= 8]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec[0],
)


def reference(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(path.read_bytes())}


@given(_SPECS, st.randoms(use_true_random=False))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_written_in_any_order_is_read_equal(tmp_path: Path, specs: list[Any], rng: random.Random) -> None:
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)
    seen: list[int] = []
    with ShardWriter(path, specs, {"k": "v"}, on_bytes=seen.append) as writer:
        data = {name: rng.randbytes(info.nbytes) for name, info in writer.tensors.items()}
        pieces = [(name, at, at + 7) for name, raw in data.items() for at in range(0, len(raw), 7)]
        rng.shuffle(pieces)
        for name, start, stop in pieces:
            writer.write(writer.tensors[name], start, memoryview(data[name][start:stop]))
    expected = {name: (dtype, shape, data[name]) for name, dtype, shape in specs}
    assert reference(path) == expected
    assert sum(seen) == sum(map(len, data.values()))
    assert path.stat().st_size == writer.file_size
    header = read_header(path)
    assert header.metadata == {"k": "v"}
    with TensorFile(header) as file:
        for name, info in header.tensors.items():
            view = memoryview(bytearray(info.nbytes))
            file.read_into(info.start, view)
            assert (info.dtype, info.shape, bytes(view)) == expected[name]


@pytest.fixture
def source(tmp_path: Path) -> Header:
    path = tmp_path / "source.safetensors"
    save_file({f"t{i}": torch.randn(50 + i, 3).bfloat16() for i in range(8)} | {"odd": torch.ones(3, dtype=torch.uint8)}, path)
    return read_header(path)


def _specs(header: Header, *leave_out: str) -> list[Any]:
    return [info.spec for name, info in header.tensors.items() if name not in leave_out]


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO, 0])
def test_copies_are_byte_equal_whoever_moves_the_bytes(
    tmp_path: Path, source: Header, refusal: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        if refusal == 0:
            return 0
        raise OSError(refusal, "no")

    if refusal is not None:
        monkeypatch.setattr(os, "copy_file_range", refused)
    out = tmp_path / "out.safetensors"
    with TensorFile(source) as file, ShardWriter(out, _specs(source)) as writer:
        pairs = [(writer.tensors[name], info) for name, info in source.tensors.items()]
        random.Random(1).shuffle(pairs)
        writer.copy(*pairs[0][:1], file, pairs[0][1])
        writer.copy_all(pairs[1:], file)
    assert reference(out) == reference(source.path)


def test_neighbours_move_as_one_run(tmp_path: Path, source: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    copy = os.copy_file_range

    def counted(src: int, dst: int, count: int, *offsets: int) -> int:
        runs.append(count)
        return copy(src, dst, count, *offsets)

    monkeypatch.setattr(os, "copy_file_range", counted)
    out = tmp_path / "out.safetensors"
    with TensorFile(source) as file, ShardWriter(out, _specs(source, "t3")) as writer:
        writer.copy_all([(info, source.tensors[name]) for name, info in writer.tensors.items()], file)
    assert len(runs) == 2  # before t3 and after it
    assert reference(out) == {name: t for name, t in reference(source.path).items() if name != "t3"}


def test_tensors_and_rows_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    a, b, s = torch.randn(5, 3).bfloat16(), torch.randn(2, 2), torch.tensor(3, dtype=torch.int64)
    with ShardWriter(out, [("s", "I64", ()), ("b", "F32", (2, 2)), ("a", "BF16", (5, 3))]) as writer:
        writer.write(writer.tensors["a"], 2 * 3 * 2, bytes_of(a[2:]))
        writer.write(writer.tensors["a"], 0, bytes_of(a[:2]))
        writer.write(writer.tensors["b"], 0, bytes_of(b))
        writer.write(writer.tensors["s"], 0, bytes_of(s))
    loaded = load_file(out)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in {"a": a, "b": b, "s": s}.items())
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_threads_write_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    tensor = torch.randint(0, 255, (400, 100), dtype=torch.uint8)
    with ShardWriter(out, [("a", "U8", (400, 100))]) as writer, ThreadPoolExecutor(4) as pool:
        info = writer.tensors["a"]
        list(pool.map(lambda row: writer.write(info, row * 100, bytes_of(tensor[row : row + 4])), range(0, 400, 4)))
    assert torch.equal(load_file(out)["a"], tensor)


def test_a_byte_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with (  # noqa: PT012
        pytest.raises(OutputError, match="'b' is not complete: byte 2 of 4 was never written"),
        ShardWriter(tmp_path / "out", [("a", "U8", (2,)), ("b", "U8", (4,))]) as writer,
    ):
        writer.write(writer.tensors["b"], 3, memoryview(b"x"))
        writer.write(writer.tensors["a"], 0, memoryview(b"xx"))
        writer.write(writer.tensors["b"], 0, memoryview(b"xx"))


def test_a_byte_that_is_written_twice_is_an_error(tmp_path: Path, source: Header) -> None:
    with (  # noqa: PT012
        pytest.raises(OutputError, match="'t1' would be written twice"),
        TensorFile(source) as file,
        ShardWriter(tmp_path / "out", _specs(source)) as writer,
    ):
        writer.write(writer.tensors["t1"], 10, memoryview(b"x"))
        writer.copy(writer.tensors["t1"], file, source.tensors["t1"])


@given(_SPECS, st.randoms(use_true_random=False))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_is_below_the_mark_is_in_the_file(tmp_path: Path, specs: list[Any], rng: random.Random) -> None:
    """At every moment, in whatever order tensors are written; and the file has its header and its size from the start."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    for each in (source, path):
        each.unlink(missing_ok=True)
    with ShardWriter(source, specs) as writer:
        for info in writer.tensors.values():
            writer.write(info, 0, memoryview(rng.randbytes(info.nbytes)))
    whole, header = source.read_bytes(), read_header(source)
    with TensorFile(header) as file, ShardWriter(path, specs) as writer:
        assert read_header(path).tensors.keys() == header.tensors.keys()
        for info in rng.sample(list(writer.tensors.values()), len(specs)):
            if rng.random() < 0.5:
                writer.copy(info, file, header.tensors[info.name])
            else:
                writer.write(info, 0, memoryview(whole[info.start : info.stop]))
            mark = writer.written.mark
            assert path.read_bytes()[:mark] == whole[:mark]
            assert mark >= header.data_start
        assert writer.written.mark == writer.file_size
    assert path.read_bytes() == whole


def test_what_is_below_the_mark_is_not_written_again(tmp_path: Path, source: Header) -> None:
    with TensorFile(source) as file, ShardWriter(tmp_path / "out", _specs(source)) as writer:
        runs = writer.copy_runs([(info, source.tensors[name]) for name, info in writer.tensors.items()])
        for run in runs:
            writer.copy_run(run, file)
        with pytest.raises(OutputError, match="would be written twice"):
            writer.copy_run(runs[0], file)


@pytest.mark.parametrize("error", [OutputError("no"), KeyboardInterrupt()])
def test_after_an_error_nobody_waits_for_the_rest(tmp_path: Path, error: BaseException) -> None:
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(type(error)), ShardWriter(tmp_path / "out", [("a", "U8", (2,))]) as writer:  # noqa: PT012
            wait = pool.submit(writer.written.wait, writer.file_size)
            raise error
        assert wait.result(10) is False


def test_what_does_not_fit_is_refused(tmp_path: Path, source: Header) -> None:
    with TensorFile(source) as file, ShardWriter(tmp_path / "out", [("a", "U8", (2,))]) as writer:
        info = writer.tensors["a"]
        for offset, data in ((1, b"xx"), (-1, b"x"), (3, b"")):
            with pytest.raises(OutputError, match="'a' has no bytes"):
                writer.write(info, offset, memoryview(data))
        with pytest.raises(OutputError, match="'t1' has no bytes"):
            writer.write(source.tensors["t1"], 0, memoryview(b"x"))
        with pytest.raises(OutputError, match="'a' takes 2 bytes, its source has"):
            writer.copy(info, file, source.tensors["t1"])
        writer.write(info, 0, memoryview(b"xx"))
    with pytest.raises(OutputError, match="the file is closed"):
        writer.write(info, 0, memoryview(b"xx"))


def test_row_25_a_source_truncated_while_it_is_copied(tmp_path: Path, source: Header) -> None:
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match="truncated while it was read"),
        TensorFile(source) as file,
        ShardWriter(tmp_path / "out", _specs(source)) as writer,
    ):
        os.truncate(source.path, source.data_start + 100)
        writer.copy_all([(writer.tensors[name], info) for name, info in source.tensors.items()], file)


def test_row_51_the_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with ShardWriter(tmp_path / "out", []):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_an_existing_file_or_link_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("kept")
    for name in ("kept", "link"):
        with pytest.raises(OutputError, match="File exists"), ShardWriter(tmp_path / name, []):
            pass
    assert (tmp_path / "kept").read_bytes() == b"kept"


@pytest.mark.parametrize("call", ["open", "posix_fallocate", "pwrite", "fsync", "close", "copy_file_range"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_row_44_a_refusal_of_any_call_is_typed_and_leaks_nothing(
    tmp_path: Path, source: Header, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "copy_file_range" and number == errno.EIO:
        pytest.skip("then the bytes are read and written, which tells whose fault it is")
    out = tmp_path / "out.safetensors"
    before = set(os.listdir("/proc/self/fd"))
    real = getattr(os, call)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if call == "close":
            real(*args)
        raise OSError(number, os.strerror(number))

    with TensorFile(source) as file:
        with pytest.raises(OutputError) as caught, monkeypatch.context() as patched:  # noqa: PT012
            patched.setattr(os, call, refused)
            with ShardWriter(out, _specs(source)) as writer:
                writer.copy_all([(writer.tensors[name], info) for name, info in source.tensors.items()], file)
        assert f"out.safetensors cannot be written: {os.strerror(number)}" in str(caught.value)
        assert re.search(r"needed 3\d\d\d bytes, free \d+", str(caught.value))
    assert set(os.listdir("/proc/self/fd")) == before


def test_row_44_no_reservation_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refused)
    with ShardWriter(tmp_path / "out", [("a", "U8", (2,))]) as writer:
        writer.write(writer.tensors["a"], 0, memoryview(b"xx"))
    assert read_header(tmp_path / "out").file_size == writer.file_size


def test_row_44_a_limit_on_file_sizes_in_a_real_process(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from lorafold.errors import OutputError
from lorafold.files.safetensors.writer import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with ShardWriter(Path(sys.argv[1]), [("a", "U8", (100_000,))]) as writer:
        writer.write(writer.tensors["a"], 0, memoryview(bytes(100_000)))
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, timeout=120)
    assert "File too large; needed 100" in done.stdout, done.stderr


def test_leaving_by_an_error_leaves_an_unfinished_file_and_no_descriptor(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "out", [("a", "U8", (2,))]):
        raise KeyboardInterrupt
    assert set(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "out").exists()


def test_row_62_names_with_spaces_and_other_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "Жар птица" / ("x" * 200)
    folder.mkdir(parents=True)
    with ShardWriter(folder / "模型 1.safetensors", [("層.重み", "U8", (1,))]) as writer:
        info: TensorInfo = writer.tensors["層.重み"]
        writer.write(info, 0, memoryview(b"x"))
    assert load_file(folder / "模型 1.safetensors")["層.重み"].tolist() == [ord("x")]

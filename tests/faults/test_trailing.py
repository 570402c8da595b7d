"""The proof follows the writing within each file: what goes wrong on either side ends both, and damage in between is found."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import lorafold
from lorafold.engine import produce as passing
from lorafold.engine.outputs import Output
from lorafold.engine.sources import Sources
from lorafold.errors import CheckpointError, OutputError, VerificationError
from lorafold.files.safetensors.writer import ShardWriter
from models import plain_adapter, plain_base

MODULES = tuple(f"p{i}_proj" for i in range(12))


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A base of two files, each of 12 tensors, of which an adapter changes each second one."""
    return plain_base(tmp_path / "base", modules=MODULES), plain_adapter(tmp_path / "adapter", modules=MODULES[::2])


def counted_proof(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that proofs are done with, as a list that grows."""
    done: list[int] = []
    real = Output.prove

    def check(self: Any, name: str, on_bytes: Any = None, until: Any = None) -> str:
        def tell(nbytes: int) -> None:
            done.append(nbytes)
            on_bytes(nbytes)

        return real(self, name, tell, until)

    monkeypatch.setattr(Output, "prove", check)
    return done


def waited(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def at_write(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call ``act(i)`` before write number i."""
    real, count = ShardWriter.write, [0]

    def write(self: ShardWriter, *args: Any) -> None:
        act(count[0])
        count[0] += 1
        real(self, *args)

    monkeypatch.setattr(ShardWriter, "write", write)


def threads() -> set[str]:
    return {thread.name.split("_")[0] for thread in threading.enumerate()} & {"check", "disk", "lorafold"}


def test_the_proof_of_a_file_begins_before_it_is_whole(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = counted_proof(monkeypatch)
    at_write(monkeypatch, lambda i: waited(lambda: done) if i == 5 else None)  # the last of the first file
    report = lorafold.merge(inputs[0], [inputs[1]], tmp_path / "out")
    assert report.proof is not None
    assert report.proof.share == 1
    assert sum(done) == report.nbytes
    assert lorafold.verify(tmp_path / "out", inputs[0], [inputs[1]]).files == report.proof.files


def test_within_a_given_memory_it_begins_after(tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    done = counted_proof(monkeypatch)
    seen: list[int] = []
    at_write(monkeypatch, lambda i: seen.append(len(done)))
    lorafold.merge(inputs[0], [inputs[1]], tmp_path / "out", max_memory=1 << 30)
    assert seen == [0] * 6 + [13] * 6


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("at", [0, 3, 8])
@pytest.mark.parametrize("where", ["write", "copy_run", "start"])
@pytest.mark.parametrize("error", [OutputError("no space"), CheckpointError("no base"), KeyboardInterrupt(), SystemExit(143)])
def test_what_ends_the_writing_ends_the_proof(
    tmp_path: Path,
    inputs: tuple[Path, Path],
    error: BaseException,
    where: str,
    at: int,
    each: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which of the two waits for the other at that moment depends on the system; no order may hang."""
    owner = Sources if where == "start" else ShardWriter
    real, count = getattr(owner, where), [0]

    def broken(*args: Any) -> Any:
        if where != "start" or threading.current_thread().name.startswith("lorafold"):
            count[0] += 1
        if count[0] > at:
            raise error
        return real(*args)

    monkeypatch.setattr(owner, where, broken)
    adapters = [inputs[1], plain_adapter(tmp_path / "other", modules=MODULES[:5], seed=3)]
    (tmp_path / "outs").mkdir()
    merge, chosen, out = (lorafold.merge_each, adapters, "") if each else (lorafold.merge, adapters[:1], "out")
    with pytest.raises(type(error)) as caught:
        merge(inputs[0], chosen, tmp_path / "outs" / out)
    assert caught.value is error
    assert threads() == set()
    assert not any(not path.name.startswith(".") for path in (tmp_path / "outs").iterdir())


def test_a_proof_that_fails_ends_the_writing_at_once(
    tmp_path: Path, inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    writes: list[int] = []

    def check(self: Any, name: str, on_bytes: Any = None, until: Any = None) -> str:
        until(1000)
        failed.set()
        raise CheckpointError("cannot be read")

    def slow(i: int) -> None:
        writes.append(i)
        if i >= 3:
            assert failed.wait(30)
            time.sleep(0.2)

    monkeypatch.setattr(Output, "prove", check)
    at_write(monkeypatch, slow)
    with pytest.raises(CheckpointError, match="cannot be read"):
        lorafold.merge(inputs[0], [inputs[1]], tmp_path / "out")
    assert len(writes) < 6  # not even the first file was written to its end
    assert threads() == set()


@pytest.mark.parametrize("least", [0, 1 << 40])
@pytest.mark.parametrize("back", [1, 7])
def test_a_byte_damaged_between_writing_and_proving_is_found(
    tmp_path: Path, inputs: tuple[Path, Path], back: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each piece of the files in turn, copied or computed, whichever way."""
    monkeypatch.setattr(passing, "LEAST", least)
    real = ShardWriter._done
    count, damaged = [0], [-1]

    def done(self: ShardWriter, start: int, nbytes: int) -> None:
        if count[0] == damaged[0]:
            fd = os.open(self.path, os.O_RDWR)
            (byte,) = os.pread(fd, 1, start + nbytes - back)
            os.pwrite(fd, bytes([byte ^ 1]), start + nbytes - back)
            os.close(fd)
        count[0] += 1
        real(self, start, nbytes)

    monkeypatch.setattr(ShardWriter, "_done", done)
    lorafold.merge(inputs[0], [inputs[1]], tmp_path / "whole")
    pieces = count[0]
    assert pieces > 14
    for i in range(pieces):
        count[0], damaged[0] = 0, i
        with pytest.raises(VerificationError, match="differs in 1 of"):
            lorafold.merge(inputs[0], [inputs[1]], tmp_path / f"out{i}")
        assert not (tmp_path / f"out{i}").exists()


@pytest.mark.parametrize("seed", range(4))
def test_in_whatever_order_the_pieces_are_written(
    tmp_path: Path, inputs: tuple[Path, Path], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passing, "LEAST", 0 if seed % 2 else 1 << 40)
    run = sys.modules["lorafold.engine.write"]
    real = run._tasks
    rng = random.Random(seed)

    def shuffled(*args: Any) -> Any:
        between: list[Any] = []
        for job in real(*args):
            if isinstance(job, run._Begin | run._End):
                rng.shuffle(between)
                yield from between
                between = []
                yield job
            else:
                between.append(job)

    lorafold.merge(inputs[0], [inputs[1]], tmp_path / "one")
    monkeypatch.setattr(run, "_tasks", shuffled)
    report = lorafold.merge(inputs[0], [inputs[1]], tmp_path / "other")
    assert report.proof is not None
    assert report.proof.share == 1
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()

"""Files are proven while they and the next ones are written, and nobody waits for a proof after an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorafold.engine.finish import Closing
from lorafold.files.safetensors.coverage import WrittenBytes


def ignore(nbytes: int) -> None:
    pass


class Writer:
    """What is asked of the writer of a file."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.path, self.close, self.written = Path("x"), close, WrittenBytes()


def file(check: Any, finish: Callable[..., None] = lambda *args, **kwargs: None, close: Callable[[], None] = lambda: None) -> Any:
    """An output whose files `check` proves, and the writer of one of them."""
    return SimpleNamespace(verify=True, prove=check, finish=finish), Writer(close)


def reading(*offsets: int, seen: list[int] | None = None) -> Any:
    """A check that reads up to each of `offsets`."""

    def check(name: str, on_bytes: Any, until: Any = None) -> str:
        for offset in offsets:
            if until is not None:
                until(offset)
            if seen is not None:
                seen.append(offset)
            on_bytes(1)
        return "sha"

    return check


def failing(name: str, on_bytes: Any, until: Any = None) -> str:
    raise ValueError("not what it must be")


@pytest.mark.parametrize("trailing", [True, False])
def test_a_check_ends_with_the_merge(trailing: bool) -> None:
    begun = threading.Event()

    def check(name: str, on_bytes: Any, until: Any = None) -> str:
        begun.set()
        while True:  # as long as anyone listens
            on_bytes(1)

    def interrupted() -> None:
        with Closing(ignore, trailing=trailing) as closing:
            one = file(check)
            closing.begin(*one)
            if not trailing:
                closing.end(*one)
            assert begun.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")])
def test_after_an_error_no_check_waits_for_bytes_that_never_come(error: BaseException) -> None:
    """Neither that of the file that is written, nor those of the files beside it."""
    seen: list[int] = []
    files = [file(reading(4, 8, seen=seen)) for _ in range(3)]

    def broken() -> None:
        with Closing(ignore) as closing:
            for each in files:
                closing.begin(*each)
            files[0][1].written.add(0, 4)
            while not seen:
                time.sleep(0.001)
            raise error

    with pytest.raises(type(error)):
        broken()
    assert seen == [4]


def test_a_check_follows_the_writing() -> None:
    seen: list[int] = []
    one = file(reading(4, 8, seen=seen))
    with Closing(ignore) as closing:
        closing.begin(*one)
        for start in (0, 4):
            one[1].written.add(start, start + 4)
            while not seen or seen[-1] != start + 4:  # before it has all its bytes
                time.sleep(0.001)
        closing.end(*one)
        closing.wait()


def test_not_trailing_a_check_begins_when_all_is_written() -> None:
    seen: list[int] = []
    one = file(reading(4, seen=seen))
    with Closing(ignore, trailing=False) as closing:
        closing.begin(*one)
        one[1].written.add(0, 4)
        assert not closing._proofs
        closing.end(*one)
        closing.wait()
    assert seen == [4]


def test_what_a_check_raises_is_seen_at_once() -> None:
    with Closing(ignore) as closing:
        closing.begin(*file(failing))

        def looking() -> None:
            for _ in range(10_000):
                closing.look()
                time.sleep(0.001)

        with pytest.raises(ValueError, match="not what it must be"):
            looking()


@pytest.mark.parametrize("trailing", [True, False])
def test_what_a_check_raises_comes_before_the_next_file(trailing: bool) -> None:
    with Closing(ignore, trailing=trailing) as closing:
        one = file(failing)
        closing.begin(*one)
        closing.end(*one)
        with pytest.raises(ValueError, match="not what it must be"):
            closing.end(*file(failing))


def test_what_the_disk_refuses_is_what_is_said_though_the_check_waits() -> None:
    def refused() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), Closing(ignore) as closing:  # noqa: PT012
        one = file(reading(8), close=refused)
        closing.begin(*one)
        closing.end(*one)
        closing.wait()


@pytest.mark.parametrize("beside", [1, 3])
@pytest.mark.parametrize("trailing", [True, False])
def test_one_file_is_proven_at_a_time_and_all_are(beside: int, trailing: bool) -> None:
    going: list[str] = []
    most: list[int] = []
    finished: list[Any] = []

    def check(name: str, on_bytes: Any, until: Any = None) -> str:
        going.append(name)
        most.append(len(going))
        if until is not None:
            until(4)
        going.pop()
        return "sha"

    with Closing(ignore, trailing=trailing) as closing:
        for _ in range(8):
            files = [file(check, lambda *args, **kwargs: finished.append(args)) for _ in range(beside)]
            for each in files:
                closing.begin(*each)
            for each in reversed(files):
                each[1].written.add(0, 4)
            for each in files:
                closing.end(*each)
        closing.wait()
    assert max(most) == 1
    assert finished == [("x", "sha")] * 8 * beside


def test_a_file_is_finished_after_disk_and_proof() -> None:
    order: list[str] = []

    def close() -> None:
        order.append("on disk")

    def check(name: str, on_bytes: Any, until: Any = None) -> str:
        order.append("proven")
        return "sha"

    with Closing(ignore) as closing:
        one = file(check, lambda *args, **kwargs: order.append("finished"), close)
        closing.begin(*one)
        closing.end(*one)
        closing.wait()
    assert sorted(order[:2]) == ["on disk", "proven"]
    assert order[2:] == ["finished"]

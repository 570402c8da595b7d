"""Files are proven while the next one is written, and nobody waits for a proof after an error."""

import threading
from types import SimpleNamespace

import pytest

from lorafold.execute.run import _Closing


def file(check, finish=lambda *args, **kwargs: None):
    output = SimpleNamespace(check=check, finish=finish, hashed=False)
    return SimpleNamespace(output=output, shard=SimpleNamespace(name="x"), writer=SimpleNamespace(close=lambda: None), kept={})


def test_a_check_ends_with_the_merge():
    begun = threading.Event()

    def check(name, on_bytes):
        begun.set()
        while True:  # as long as anyone listens
            on_bytes(1)

    def interrupted():
        with _Closing(lambda nbytes: None) as closing:
            closing.begin(file(check))
            assert begun.wait(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_what_a_check_raises_comes_before_the_next_file():
    def check(name, on_bytes):
        raise ValueError("not what it must be")

    with _Closing(lambda nbytes: None) as closing:
        closing.begin(file(check))
        with pytest.raises(ValueError, match="not what it must be"):
            closing.begin(file(check))


def test_one_file_is_proven_at_a_time_and_all_are():
    going, most, finished = [], [], []

    def check(name, on_bytes):
        going.append(name)
        most.append(len(going))
        going.pop()
        return "sha"

    with _Closing(lambda nbytes: None) as closing:
        for _ in range(20):
            closing.begin(file(check, lambda *args, **kwargs: finished.append(args)))
        closing.wait()
    assert max(most) == 1
    assert finished == [("x", "sha", {})] * 20

"""The mark against a set of offsets, and waiting for it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from lorafold.files.safetensors.coverage import WrittenBytes


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_mark_is_the_first_offset_that_is_not_written(lengths: list[int], rng: random.Random) -> None:
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pieces = list(pairwise(ends))
    rng.shuffle(pieces)
    written, model = WrittenBytes(), set[int]()
    for start, stop in pieces:
        written.add(start, stop)
        model |= set(range(start, stop))
        assert written.mark == min(set(range(ends[-1] + 1)) - model)
        assert written.wait(written.mark)
    assert written.mark == ends[-1]


def test_who_waits_goes_on_when_all_before_is_written() -> None:
    written, begun = WrittenBytes(), threading.Barrier(3)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(lambda offset: (begun.wait(10), written.wait(offset))[1], offset) for offset in (4, 8)]
        begun.wait(10)
        written.add(4, 8)
        assert not any(each.done() for each in waits)
        written.add(0, 4)
        assert [each.result(10) for each in waits] == [True, True]


def test_nobody_waits_for_what_never_comes() -> None:
    written = WrittenBytes()
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(written.wait, 8)
        written.add(0, 4)
        written.end()
        assert wait.result(10) is False
    assert written.wait(4)
    assert not written.wait(5)

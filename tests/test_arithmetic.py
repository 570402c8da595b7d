"""torch's threads are out of the way while ours are about to work, and back after the last."""

from __future__ import annotations

import threading

import pytest
import torch

from lorafold.arithmetic import one_thread


def test_the_number_of_threads_comes_back_after_the_last() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with one_thread():
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), one_thread():
            print(1 / 0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_threads_that_overlap_do_not_leave_it_at_one() -> None:
    before = torch.get_num_threads()
    inside, out = threading.Barrier(2), threading.Event()

    def other() -> None:
        with one_thread():
            inside.wait()
            out.wait()

    try:
        torch.set_num_threads(2)
        thread = threading.Thread(target=other)
        with one_thread():
            thread.start()
            inside.wait()
        assert torch.get_num_threads() == 2  # while the other is still within
        out.set()
        thread.join()
        assert torch.get_num_threads() == 2
    finally:
        out.set()
        torch.set_num_threads(before)

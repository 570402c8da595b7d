"""Threads that merge and unmerge the same layers never lose a base: each layer ends as one of them left it."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.nn import merge, unmerge
from lorafold.nn.layers.conv import Conv2d
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def model(undo: Any = "copy") -> nn.Module:
    torch.manual_seed(0)
    layers = [
        Linear(16, 16, r=2, undo=undo),
        MergedLinear(16, 12, r=2, enable_lora=[True, False, True], undo=undo),
        Embedding(9, 8, r=2, undo=undo),
        Conv2d(2, 3, 3, r=1, undo=undo),
    ]
    for layer in layers:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return nn.ModuleList(layers)


def weights(layers: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in layers.children()]  # type: ignore[operator]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def together(*calls: Callable[[], Any]) -> list[BaseException]:
    """What the calls raise, each in a thread of its own, begun at one moment."""
    raised: list[BaseException] = []
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        gate.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_a_thousand_rounds_of_threads_that_merge_and_unmerge() -> None:
    layers = model()
    base = weights(layers)
    merged = weights(copy.deepcopy(layers).eval())
    for round_ in range(1000):
        assert together(layers.eval, layers.train if round_ % 2 else layers.eval, layers.eval) == []
        now = weights(layers)
        assert all(
            torch.equal(weight, m if layer.merged else b)
            for layer, weight, b, m in zip(layers.children(), now, base, merged, strict=True)
        ), round_
        layers.train()
        assert same(weights(layers), base), round_


@pytest.mark.parametrize("undo", ["copy-cpu", "compact"])
def test_every_way_of_undoing(undo: str) -> None:
    layers = model(undo)
    base = weights(layers)
    for _ in range(50):
        assert together(layers.eval, layers.train, lambda: merge(layers), lambda: unmerge(layers)) == []
        layers.train()
        assert same(weights(layers), base)


def test_exports_see_the_base_whatever_others_do() -> None:
    layers = model()
    wanted = [layer.merged_weight() for layer in layers.children()]  # type: ignore[operator]
    found: list[list[Tensor]] = []

    def export() -> None:
        found.extend([[layer.merged_weight() for layer in layers.children()] for _ in range(20)])  # type: ignore[operator]

    def turn() -> None:
        for _ in range(20):
            layers.eval()
            layers.train()

    assert together(export, turn, export) == []
    assert len(found) == 40
    assert all(same(each, wanted) for each in found)


def test_a_copy_has_a_lock_of_its_own() -> None:
    layer = Linear(4, 4, r=2)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with layer._lock:
            assert together(other.eval) == []
        assert other.merged
    assert not layer.merged

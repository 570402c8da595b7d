"""Locks: one that each layer has, so that threads which call `eval()` and `train()` merge once and never lose the base; and one a
model, for what writes to the weights of several layers at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class LayerLock:
    """A lock that its holder may take again. A copy of it, also a pickled one, is a new lock that nobody holds."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[LayerLock], tuple[()]]:
        return LayerLock, ()


def locked(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """`method`, which holds the lock of its layer, `_lock`, while it runs."""

    @wraps(method)
    def holding(self: T, *args: P.args, **kwargs: P.kwargs) -> R:
        lock: Any = self._lock  # type: ignore[attr-defined]
        with lock:
            return method(self, *args, **kwargs)

    return cast(Callable[Concatenate[T, P], R], holding)


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def model_lock(model: nn.Module) -> threading.RLock:
    """The lock that `merge`, `unmerge`, `merged` and `swap` hold on `model` while they write to its weights.

    Threads that run the model hold it for each forward pass, and so never see weights of two adapters at once::

        with model_lock(model):
            logits = model(tokens)
    """
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())

"""A lock that each layer has of its own, so that threads which call `eval()` and `train()` merge once and never lose the base."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

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

"""One lock a model, for what writes to the weights of several layers at once."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

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

"""The adapters that a caller gives, by path or read already, as the base that they are for has them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..adapters.adapter import Adapter, Base, WeightedAdapter, on_base
from ..adapters.load import load_adapter
from ..adapters.options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError, printable
from ..planning.names.offers import shapes_of
from ..planning.names.renames import renamed

AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | WeightedAdapter
"""A path, a path and a weight, or an adapter that has been read."""


def weighted(adapters: Sequence[AdapterLike], checkpoint: Checkpoint, options: ReadOptions | None = None) -> list[WeightedAdapter]:
    """The adapters at paths, as they are on `checkpoint`, with the weights given beside them."""
    base = Base(checkpoint.config or {}, shapes_of(checkpoint))
    given = loaded(adapters, options)
    found = renamed([on_base(each.adapter, base) for each in given], () if options is None else options.renames)
    return [WeightedAdapter(adapter, each.adapter_weight) for adapter, each in zip(found, given, strict=True)]


def loaded(adapters: Sequence[AdapterLike], options: ReadOptions | None = None) -> list[WeightedAdapter]:
    """The adapters at paths, with the weights given beside them."""
    if isinstance(adapters, str | os.PathLike):
        raise PlanError(f"adapters must be a list of paths, not the path {printable(str(adapters))}")
    return [_weighted(each, options) for each in adapters]


def _weighted(given: AdapterLike | Adapter, options: ReadOptions | None) -> WeightedAdapter:
    if isinstance(given, WeightedAdapter):
        return given
    if isinstance(given, Adapter):
        return WeightedAdapter(given)
    path, weight = given if isinstance(given, tuple) else (given, 1.0)
    return WeightedAdapter(load_adapter(path, options), weight)

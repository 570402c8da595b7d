"""The adapters that a caller gives, by path or read already, each with what is said about reading it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..adapters.adapter import Adapter, WeightedAdapter, on_base
from ..adapters.formats.peft.from_model import adapters_of
from ..adapters.load import load_adapter
from ..adapters.read_options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError, printable
from ..planning.names.gguf_names import has_names_of_llama_cpp, in_gguf, told_of
from ..planning.names.renames import renamed
from ..planning.resolve import prepared

AdapterPath = str | os.PathLike[str] | nn.Module
"""A path, or a model in memory of PEFT, whose active adapters are meant."""

AdapterLike = AdapterPath | tuple[AdapterPath | Adapter, float] | tuple[AdapterPath, float, ReadOptions] | Adapter | WeightedAdapter
"""A path, a path and a weight, these and how it is read, or an adapter that has been read, by itself or with a weight."""


@dataclass(frozen=True)
class Given:
    """An adapter that was read, with its weight, and how it was read."""

    weighted: WeightedAdapter
    options: ReadOptions


def loaded(adapters: Sequence[AdapterLike], options: ReadOptions | None = None) -> list[Given]:
    """The adapters at paths, with the weights given beside them; `options` are for those that have none of their own."""
    if isinstance(adapters, str | os.PathLike):
        raise PlanError(f"adapters must be a list of paths, not the path {printable(str(adapters))}")
    if isinstance(adapters, nn.Module):
        raise PlanError("adapters must be a list, not one model", hint="give a list of it: [model]")
    return [given for each in adapters for given in _given(each, options or ReadOptions())]


def placed(given: Sequence[Given], checkpoint: Checkpoint) -> list[WeightedAdapter]:
    """The adapters as they are on `checkpoint`, under the names that their options give their modules."""
    named = has_names_of_llama_cpp(checkpoint)
    base = told_of(checkpoint)
    read = [each.weighted.adapter for each in given]
    found = {i: each if named and each.format == "gguf" else on_base(each, base) for i, each in enumerate(read)}
    for rules in dict.fromkeys(each.options.renames for each in given):
        same = [i for i, each in enumerate(given) if each.options.renames == rules]
        found |= dict(zip(same, renamed([found[i] for i in same], rules), strict=True))
    place = in_gguf if named else prepared
    return [WeightedAdapter(place(found[i], checkpoint), each.weighted.adapter_weight) for i, each in enumerate(given)]


def _given(each: AdapterLike, options: ReadOptions) -> list[Given]:
    """One adapter; of a model of PEFT those that are active."""
    if isinstance(each, WeightedAdapter):
        return [Given(each, options)]
    if isinstance(each, Adapter):
        return [Given(WeightedAdapter(each), options)]
    path, weight, *own = each if isinstance(each, tuple) else (each, 1.0)
    if isinstance(path, Adapter):
        return [Given(WeightedAdapter(path, weight), options)]
    if own:
        (options,) = own
    if isinstance(path, nn.Module):
        return [Given(WeightedAdapter(adapter, weight), options) for adapter in adapters_of(path, options)]
    return [Given(WeightedAdapter(load_adapter(path, options), weight), options)]

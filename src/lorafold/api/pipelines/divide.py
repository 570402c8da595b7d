"""Which component of a pipeline each part of an adapter is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...adapters.formats.diffusion.components import folders_of, narrowed, parts_of
from ...checkpoints.pipeline import Pipeline
from ...errors import UnmatchedAdapterError, printable
from ..loading import Given

_MAIN = ("unet", "transformer", "prior")
"""What an adapter is for that names no component."""


def divide(
    pipeline: Pipeline, given: Sequence[Given], *, allow_partial: bool = False
) -> tuple[dict[str, list[Given]], tuple[str, ...]]:
    """By component of `pipeline` what of each adapter is for it, and the modules that `allow_partial` leaves out: those for none.

    An adapter that names no component is for the one that its options say, by default the main model.

    Raises `UnmatchedAdapterError` where a part of one has no component there.
    """
    shares: dict[str, list[Given]] = {}
    left: list[str] = []
    for each in given:
        adapter, component = each.weighted.adapter, each.options.component
        main = _MAIN if component is None else (component,)
        chosen: dict[str, list[str]] = {}
        for part, names in parts_of(adapter).items():
            folder = next((name for name in (folders_of(part) if part else main) if name in pipeline.models), None)
            if folder is None and allow_partial and len(names) < len(adapter.modules):
                left += names
                continue
            if folder is None:
                raise UnmatchedAdapterError(
                    f"{printable(str(adapter.path))} has {len(names)} modules for {printable(part or 'the main model')}, which"
                    f" {printable(str(pipeline.root))} does not have; it has {', '.join(pipeline.models) or 'no weights'}",
                    unmatched=[printable(name) for name in names],
                    nearest={},
                    hint="nothing was written; `ReadOptions(component=…)` merges what is for that one alone",
                )
            chosen.setdefault(folder, []).extend(names)
        if adapter.replacements or adapter.rows:  # only formats that name no component have them
            folder = next((name for name in main if name in pipeline.models), None)
            chosen.setdefault(folder or main[0], [])
        for folder, modules in chosen.items():
            shares.setdefault(folder, []).append(replace(each, weighted=replace(each.weighted, adapter=narrowed(adapter, modules))))
    return shares, tuple(left)

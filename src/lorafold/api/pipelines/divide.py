"""Which component of a pipeline each part of an adapter is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...adapters.adapter import WeightedAdapter
from ...adapters.formats.diffusion.components import folders_of, narrowed, parts_of
from ...checkpoints.pipeline import Pipeline
from ...errors import UnmatchedAdapterError, printable

_MAIN = ("unet", "transformer", "prior")
"""What an adapter is for that names no component."""


@dataclass(frozen=True)
class Division:
    """`shares`: by component, what of each adapter is for it; `left_out`: modules that are for none that the pipeline has."""

    shares: Mapping[str, Sequence[WeightedAdapter]]
    left_out: tuple[str, ...] = ()


def divide(
    pipeline: Pipeline, adapters: Sequence[WeightedAdapter], *, component: str | None = None, allow_partial: bool = False
) -> Division:
    """What of each adapter is for which component of `pipeline`; `allow_partial` leaves out what is for none, if not all.

    `component` is what an adapter is for that names none, by default the main model.

    Raises `UnmatchedAdapterError` where a part of one has no component there.
    """
    shares: dict[str, list[WeightedAdapter]] = {}
    left: list[str] = []
    main = _MAIN if component is None else (component,)
    for weighted in adapters:
        adapter = weighted.adapter
        chosen: dict[str, list[str]] = {}
        for part, names in parts_of(adapter).items():
            folder = next((each for each in (folders_of(part) if part else main) if each in pipeline.models), None)
            if folder is None and allow_partial and len(names) < len(adapter.modules):
                left += names
                continue
            if folder is None:
                raise UnmatchedAdapterError(
                    f"{printable(str(adapter.path))} has {len(names)} modules for {printable(part or 'the main model')}, which"
                    f" {printable(str(pipeline.root))} does not have; it has {', '.join(pipeline.models) or 'no weights'}",
                    unmatched=[printable(name) for name in names],
                    nearest={},
                    hint="nothing was written; --component NAME merges what is for that one alone",
                )
            chosen.setdefault(folder, []).extend(names)
        if adapter.replacements or adapter.rows:  # only formats that name no component have them
            folder = next((each for each in main if each in pipeline.models), None)
            chosen.setdefault(folder or main[0], [])
        for folder, modules in chosen.items():
            shares.setdefault(folder, []).append(WeightedAdapter(narrowed(adapter, modules), weighted.adapter_weight))
    return Division(shares, tuple(left))

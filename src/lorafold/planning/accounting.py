"""Where each tensor of an adapter went: into base tensors, or nowhere, with the reason. None is passed over in silence."""

from __future__ import annotations

from collections.abc import Iterator

from ..adapters.adapter import Adapter
from ..errors import AdapterError, PlanError, printable
from .resolve import Resolution

_FACTORS = (".alpha", ".scale", ".scalar")
"""How the names of single numbers end that formats keep beside a module for its factor."""


def left_out(adapter: Adapter, resolution: Resolution) -> dict[str, str]:
    """The tensors of the file of `adapter` that go into no tensor of the output, each with the reason.

    Raises `PlanError` where there is none: the reader of the format forgot the tensor.
    """
    reasons = dict(_reasons(adapter, resolution))
    used = set(_used(adapter, resolution))
    found = {name: reasons.get(name, "") for name in adapter.header.tensors if name not in used}
    forgotten = [name for name, why in found.items() if not why]
    if forgotten:
        raise PlanError(
            f"{printable(str(adapter.header.path))}: '{printable(forgotten[0])}' is used nowhere, and nothing says why",
            hint="nothing was written; this is a fault of lorafold's: please report it, with the names of the adapter's tensors",
        )
    return found


def check_attention(adapter: Adapter, resolution: Resolution) -> None:
    """Raises `AdapterError` where an attention's input projections are there without its output projection: PEFT adapts both."""
    for name, targets in resolution.targets.items():
        own = adapter.modules[name].tensor == f"{name}.weight"
        if (
            own
            and targets[0].rows is None
            and targets[0].tensor.endswith(".in_proj_weight")
            and f"{name}.out_proj" not in adapter.modules
        ):
            raise AdapterError(
                f"{printable(str(adapter.path))} holds a pair for {printable(targets[0].tensor)}, but none for"
                f" {printable(name)}.out_proj, which PEFT trains with it",
                hint="tensors were lost; nothing was written",
            )


def _used(adapter: Adapter, resolution: Resolution) -> Iterator[str]:
    for name in resolution.targets.keys() | resolution.biases.keys():
        yield from (info.name for info in adapter.modules[name].stored)
    yield from (adapter.replacements[name].name for name in resolution.replacements)
    yield from (adapter.rows[name].values.name for name in resolution.rows)


def _reasons(adapter: Adapter, resolution: Resolution) -> Iterator[tuple[str, str]]:
    """Why a tensor may go nowhere; what comes later counts."""
    for name, info in adapter.header.tensors.items():
        if adapter.format != "peft":  # one file may be of several parts of a pipeline, and hold the factors as tensors
            yield name, "of another part than this base" if info.numel > 1 else ""
        if info.numel == 1 and name.endswith(_FACTORS):
            yield name, "its number is in the factor of its module"
        if info.numel == 1 and name.endswith(".on_input"):
            yield name, "it says what the numbers of its module are of"
    for module in adapter.modules.values():
        for info in module.stored:
            yield info.name, "the base has no place for it"
    for info in (*adapter.replacements.values(), *(rows.values for rows in adapter.rows.values())):
        yield info.name, "the base has no place for it"
    for name in adapter.replacements.keys() - resolution.replacements.keys() - set(resolution.unmatched):
        yield adapter.replacements[name].name, "it holds the base's own numbers"
    yield from adapter.left_out.items()

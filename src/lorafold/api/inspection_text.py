"""What `inspect` found, as people read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import printable
from ..planning.summary import kind_of
from ..text import Summary, Table, plural, size


def adapter_summary(name: str, adapter: Mapping[str, Any], *, everything: bool) -> Summary:
    """Of an adapter: equal modules together, or with `everything` each by itself."""
    modules: Mapping[str, Any] = adapter["modules"]
    replaced = plural(len(adapter["replacements"]), "replaced tensor")
    facts = [
        ("base", printable(adapter["base_model"]) if adapter["base_model"] else "not stated"),
        ("holds", f"{plural(len(modules), 'module')}, {replaced}, {size(adapter['bytes'])}"),
        ("‖ΔW‖", f"{adapter['norm']:.6g} in all"),
    ]
    after = [
        *(("replaces", f"{printable(each)} {info['shape']} {info['dtype']}") for each, info in adapter["replacements"].items()),
        *(("rows", f"{len(indices)} of {printable(each)}") for each, indices in adapter["rows"].items()),
        *(("note", note) for note in adapter["notes"]),
    ]
    table = _modules(modules) if everything else _kinds_of_modules(modules)
    return Summary(f"{printable(name)}, a LoRA adapter in the format {adapter['format']}", facts, table, after)


def checkpoint_summary(name: str, checkpoint: Mapping[str, Any], *, everything: bool) -> Summary:
    """Of a checkpoint; with `everything` its tensors too."""
    kind = f", a {printable(str(checkpoint['model_type']))} model" if checkpoint["model_type"] else ", a checkpoint"
    dtypes = ", ".join(f"{count:,} {printable(dtype)}" for dtype, count in checkpoint["parameters_by_dtype"].items())
    holds = f"{plural(len(checkpoint['tensors']), 'tensor')}, {dtypes} parameters, {size(checkpoint['bytes'])}"
    facts = [
        ("holds", holds),
        *(("file", f"{printable(file)}, {size(count)}") for file, count in checkpoint["files"].items()),
        *(("merged", _merged(each)) for each in (checkpoint["receipt"] or {"adapters": ()})["adapters"]),
    ]
    rows = [(each, str(t["shape"]), t["dtype"], t["file"]) for each, t in checkpoint["tensors"].items()]
    return Summary(printable(name) + kind, facts, Table(("tensor", "shape", "dtype", "file"), rows) if everything else None)


def _merged(adapter: Mapping[str, Any]) -> str:
    return f"{printable(adapter['name'])} at weight {adapter['adapter_weight']:g}, {printable(adapter['sha256'][:12])}…"


def _modules(modules: Mapping[str, Any]) -> Table:
    rows = [(name, *_scaling(module), f"{module['norm']:.4g}") for name, module in modules.items()]
    return Table(("module", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (3, 4, 6))


def _kinds_of_modules(modules: Mapping[str, Any]) -> Table:
    groups: dict[tuple[str, ...], list[float]] = {}
    for name, module in modules.items():
        groups.setdefault((kind_of(name), *_scaling(module)), []).append(module["norm"])
    rows = [(str(len(norms)), *row, _range(norms)) for row, norms in groups.items()]
    return Table(("", "modules", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (0, 4, 5, 7))


def _scaling(module: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(module["shape"]),
        module["dtype"],
        str(module["r"]),
        f"{module['scaling']:.6g}",
        module["why"] + (", then DoRA" if module["dora"] else ""),
    )


def _range(norms: Sequence[float]) -> str:
    low, high = f"{min(norms):.4g}", f"{max(norms):.4g}"
    return low if low == high else f"{low} to {high}"

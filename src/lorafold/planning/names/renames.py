"""Names that nobody foresaw: what the user says that an adapter's names are to be read as, before anything is looked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from ...adapters.adapter import Adapter
from ...adapters.formats.peft.names import unwrapped
from ...errors import AdapterError, InputError, printable

T = TypeVar("T")


def renamed(adapters: Sequence[Adapter], rules: Sequence[Rule]) -> list[Adapter]:
    """`adapters` with `rules` applied to the names of the tensors that they are for, in their order; noted where they change one.

    Raises `InputError` for a rule that fits no name of any of them, `AdapterError` where two names become one.
    """
    rules = [(unwrapped(old), unwrapped(new)) for old, new in rules]  # no name holds what wraps modules any more
    rules = [(old, new) for old, new in rules if old != new]
    for i, (old, new) in enumerate(rules):
        names = [respelled(name, rules[:i]) for adapter in adapters for name in adapter.tensor_names]
        if not old.strip("^") or all(respelled(name, [(old, new)]) == name for name in names):
            some = ", ".join(printable(name) for name in names[:3])
            raise InputError(
                f"`ReadOptions(renames=(({old!r}, {new!r}),))` fits no name in {' or '.join(each.name for each in adapters)}:"
                f" {some}, …",
                hint="OLD is a run of whole names between dots; * stands for any one of them, ^ for the front",
            )
    return [_renamed(adapter, rules) if rules else adapter for adapter in adapters]


def _renamed(adapter: Adapter, rules: Sequence[Rule]) -> Adapter:
    modules = {name: replace(module, tensor=respelled(module.tensor, rules)) for name, module in adapter.modules.items()}
    changed = [name for name, module in adapter.modules.items() if module.tensor != modules[name].tensor]
    replacements, rows = _keys(adapter.replacements, rules, adapter), _keys(adapter.rows, rules, adapter)
    places = [(module.tensor, module.index) for module in modules.values()]
    double = next((name for name, place in zip(modules, places, strict=True) if places.count(place) > 1), None)
    if double is not None and len({(module.tensor, module.index) for module in adapter.modules.values()}) == len(places):
        raise AdapterError(
            f"{printable(str(adapter.path))}: `ReadOptions(renames=…)` makes {printable(double)} and another module the same"
        )
    changed += [name for name in (*adapter.replacements, *adapter.rows) if respelled(name, rules) != name]
    if not changed:
        return adapter
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    note = f"{printable(adapter.name)}: {printable(changed[0])}{more} renamed as `ReadOptions(renames=…)` says"
    return replace(adapter, modules=modules, replacements=replacements, rows=rows, notes=(*adapter.notes, note))


def _keys(named: Mapping[str, T], rules: Sequence[Rule], adapter: Adapter) -> dict[str, T]:
    found: dict[str, T] = {}
    for name, value in named.items():
        new = respelled(name, rules)
        if new in found:
            raise AdapterError(
                f"{printable(str(adapter.path))}: `ReadOptions(renames=…)` makes {printable(name)} and another tensor the same"
            )
        found[new] = value
    return found


Rule = tuple[str, str]


def respelled(name: str, rules: Iterable[Rule]) -> str:
    """`name` with each of `rules` applied to the first place that it fits, in their order.

    >>> respelled("h.0.block_sparse_moe.experts.3.w1", [("block_sparse_moe", "mlp"), ("experts.*.w1", "experts.*.gate_proj")])
    'h.0.mlp.experts.3.gate_proj'
    >>> respelled("model.language_model.norm.weight", [("^language_model", "model.language_model")])
    'model.language_model.norm.weight'
    """
    for old, new in rules:
        front, run, needed = _parsed(old)
        if not all(word in name for word in needed):  # which spares most names the rest
            continue
        parts = name.split(".")
        last = 0 if front else len(parts) - len(run)
        for start in range(last + 1):
            here = parts[start : start + len(run)]
            if len(here) == len(run) and all(want in ("*", found) for want, found in zip(run, here, strict=True)):
                stars = iter([found for want, found in zip(run, here, strict=True) if want == "*"])
                put = [next(stars, part) if part == "*" else part for part in new.split(".") if part]
                name = ".".join([*parts[:start], *put, *parts[start + len(run) :]])
                break
    return name


@cache
def _parsed(old: str) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether the rule is tied to the front; its names; and those of them that must be there, the last ones first."""
    run = tuple(old.removeprefix("^").split("."))
    return old.startswith("^"), run, tuple(name for name in reversed(run) if name != "*")

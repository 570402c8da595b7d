"""What an adapter's configuration says was trained, held against what its file has and the base has room for.

A file that lost tensors looks like one of an adapter that never had them; only the configuration and the base tell. What cannot
be anything but a loss is an error, what could have been meant is a note.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..adapters.adapter import Adapter
from ..adapters.formats.peft.patterns import PatternError, matches
from ..errors import AdapterError, printable
from ..files.expression import Matrix
from .names.offers import EXPERT, Offers
from .names.prefix import Rename


def check_trained(
    adapter: Adapter, rename: Rename, offers: Offers, changed: Collection[str], tensors: Mapping[str, Matrix]
) -> list[str]:
    """Notes on modules and biases of the base that the configuration names and the adapter's file does not hold.

    - `rename`: from the adapter's names to those that the base `offers`; `changed`: what it holds something for, of `tensors`

    Raises `AdapterError` where nothing at all is there of an entry of modules_to_save that the base has.
    """
    spelled = {offers.spell(name): name for name in tensors}
    part = {name: tensor for name, tensor in spelled.items() if name.startswith(rename.add)}  # the part that was trained
    held = {name for name, tensor in part.items() if tensor in changed}
    return [
        *_saved(adapter, held, part),
        *_targeted(adapter, rename, held, part),
        *_biases(adapter, held, {name: tensors[tensor] for name, tensor in part.items()}),
        *_experts(adapter, rename, offers),
    ]


def _saved(adapter: Adapter, held: Collection[str], names: Collection[str]) -> list[str]:
    notes = []
    saved = adapter.config.get("modules_to_save") or []
    for entry in [saved] if isinstance(saved, str) else saved:
        named = {name for name in names if any(part.endswith(entry) for part in _above(name))}
        missing = sorted(named - set(held))
        if missing and len(missing) == len(named):
            raise AdapterError(
                f"{printable(str(adapter.header.path))} holds nothing for '{printable(entry)}' of modules_to_save;"
                f" the base has {_some(missing)}",
                hint="tensors were lost, or the configuration is not of this file; nothing was written",
            )
        if missing:
            notes.append(f"modules_to_save names '{printable(entry)}', but the adapter holds nothing for {_some(missing)}")
    return notes


def _targeted(adapter: Adapter, rename: Rename, held: Collection[str], names: Collection[str]) -> list[str]:
    listed = adapter.config.get("target_modules")
    if any(adapter.config.get(field) for field in ("layers_to_transform", "exclude_modules")):
        return []
    modules = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and name not in held]
    if isinstance(listed, str):
        try:
            missing = [n for n in modules if any(matches(listed, each) for each in (n, rename.strip + n.removeprefix(rename.add)))]
        except PatternError as cause:
            return [f"target_modules was not compared with what the adapter holds: {printable(str(cause))}"]
    else:
        ends = tuple(f".{end}" for end in listed or ())
        missing = [name for name in modules if f".{name}".endswith(ends)]
    if not missing:
        return []
    return [f"target_modules covers modules of the base for which the adapter holds nothing: {_some(missing)}"]


def _biases(adapter: Adapter, held: Collection[str], tensors: Mapping[str, Matrix]) -> list[str]:
    kind = adapter.config.get("bias") or "none"
    biases = [name for name, info in tensors.items() if name.endswith(".bias") and len(info.shape) == 1 and name not in held]
    if kind == "lora_only":
        biases = [name for name in biases if f"{name.removesuffix('.bias')}.weight" in held]
    if kind == "none" or not biases:
        return []
    return [f"bias is '{kind}', but the adapter holds none for {_some(biases)}"]


def _experts(adapter: Adapter, rename: Rename, offers: Offers) -> list[str]:
    """A note where some experts of a stack are adapted, and others are not."""
    adapted: dict[str, set[int]] = {}
    for module in adapter.modules.values():
        name = rename(offers.spell(module.tensor))
        if found := EXPERT.fullmatch(name):
            adapted.setdefault(f"{found['stack']}.{found['leaf']}", set()).add(int(found["index"]))
        elif module.index is not None:
            adapted.setdefault(name, set()).add(module.index)
    lacking = []
    for name, experts in adapted.items():
        stack = name if offers.experts_of(name) else f"{name.rpartition('.')[0]}.gate_up_proj"
        lacking += [f"expert {expert} of {name}" for expert in sorted(offers.experts_of(stack) - experts)]
    return [f"the adapter holds nothing for {_some(lacking)}"] if lacking else []


def _above(tensor: str) -> list[str]:
    """The modules that the tensor is in, innermost first."""
    parts = tensor.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(printable(name) for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

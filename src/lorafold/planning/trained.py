"""What an adapter's configuration says was trained, held against what its file has and the base has room for.

A file that lost tensors looks like one of an adapter that never had them; only the configuration and the base tell. What cannot
be anything but a loss is an error, what could have been meant is a note.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping

from ..adapters.adapter import Adapter
from ..adapters.formats.peft.names import Endings
from ..adapters.formats.peft.patterns import PatternError
from ..adapters.formats.peft.selection import Selection, targets_of_config
from ..errors import SHOWN, AdapterError, nearest_names, printable
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
        *_targeted(adapter, rename, offers, held, {name: tensors[tensor] for name, tensor in part.items()}),
        *_biases(adapter, held, {name: tensors[tensor] for name, tensor in part.items()}),
        *_experts(adapter, rename, offers),
    ]


def _saved(adapter: Adapter, held: Collection[str], names: Collection[str]) -> list[str]:
    notes = []
    entries = _saved_entries(adapter)
    above = _by_reversed(names) if entries else []
    for entry in entries:
        named = _ending(above, entry)
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


def _targeted(adapter: Adapter, rename: Rename, offers: Offers, held: Collection[str], tensors: Mapping[str, Matrix]) -> list[str]:
    """Notes on modules that target_modules names: those that the base has and the adapter not, and those that it has not either.

    Raises `AdapterError` where nothing at all is there of an entry, though PEFT would have put an adapter on modules of the base.
    """
    listed, selection = targets_of_config(adapter.config), Selection(adapter.config)
    try:
        missing = [
            name
            for name in _modules(adapter, rename, offers, tensors)
            if f"{name}.weight" not in held and any(selection.selects(each) for each in _as_trained(name, rename))
        ]
    except PatternError as cause:
        return [f"target_modules was not compared with what the adapter holds: {printable(str(cause))}"]
    if adapter.format != "peft" or isinstance(listed, str):
        absent = []
    else:  # of either the other may have a longer prefix
        modules = Endings(adapter.modules)
        absent = [entry for entry in listed if not modules.meets(entry)]
    vectors = {
        name.removesuffix(".weight") for name, info in tensors.items() if len(info.shape) < 2
    }  # of norms, which take no LoRA
    could = Endings(name for name in missing if name not in vectors)
    lost = [entry for entry in absent if could.meets(entry)]
    if absent and len(absent) == len(listed) and not adapter.config.get("target_parameters"):
        lost = absent  # PEFT asks that one matches
    if lost:
        raise _lost(adapter, lost, len(listed))
    notes = []
    saved = Endings(_saved_entries(adapter))
    if nowhere := [entry for entry in absent if not saved.meets(entry)]:
        notes.append(f"target_modules names {_some(nowhere)}, which the base has no module for, or none that was to be adapted")
    if missing:
        notes.append(f"target_modules covers modules of the base for which the adapter holds nothing: {_some(missing)}")
    return notes


def _modules(adapter: Adapter, rename: Rename, offers: Offers, tensors: Mapping[str, Matrix]) -> list[str]:
    """The modules of the base that may have been adapted; those that it stores in another way only where others of them were."""
    stored = set(tensors)
    own = {rename(offers.spell(module.tensor)) for module in adapter.modules.values()}
    apart = any(EXPERT.fullmatch(name) for name in own)  # experts one by one, which transformers 5 has in a stack
    found = [name.removesuffix(".weight") for name in stored if name.endswith(".weight") and (apart or not EXPERT.fullmatch(name))]
    found += [name.removesuffix(".in_proj_weight") for name in stored if name.endswith(".in_proj_weight")]
    if not own - stored:
        return found
    others = (name.removesuffix(".weight") for name in sorted(offers.names - stored) if name.endswith(".weight"))
    others = (name for name in others if name.startswith(rename.add) and (apart or not EXPERT.fullmatch(f"{name}.weight")))
    return found + [name for name in others if f"{name}.weight" not in own]


def _as_trained(name: str, rename: Rename) -> tuple[str, ...]:
    """What the module `name` of the base may be called in the model that was trained."""
    return name, rename.strip + name.removeprefix(rename.add)


def _saved_entries(adapter: Adapter) -> list[str]:
    saved = adapter.config.get("modules_to_save") or []
    return [saved] if isinstance(saved, str) else list(saved)


def _lost(adapter: Adapter, lost: list[str], count: int) -> AdapterError:
    found = sorted({name.rpartition(".")[2] for name in adapter.modules})
    near = [f"   (did you mean {n[0]}?)" if (n := nearest_names(target, found)) else "" for target in lost[:SHOWN]]
    tips = [f"  {printable(target)}{tip}" for target, tip in zip(lost, near, strict=False)]
    tips += [f"  … and {len(lost) - SHOWN} more"] if len(lost) > SHOWN else []
    held = ", ".join(printable(name) for name in found[:SHOWN]) + (" …" if len(found) > SHOWN else "")
    return AdapterError(
        f"{printable(str(adapter.header.path))} holds nothing for {len(lost)} of the {count} target_modules:\n"
        + "\n".join(tips)
        + f"\nit holds {held or 'no LoRA pairs'}",
        hint="tensors were lost, or the configuration is not of this file; nothing was written",
    )


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


def _by_reversed(names: Collection[str]) -> list[tuple[str, str]]:
    """All modules that the tensors `names` are in, each spelled backwards, with the tensor; sorted."""
    return sorted((module[::-1], name) for name in names for module in _above(name))


def _ending(above: list[tuple[str, str]], end: str) -> set[str]:
    """The tensors that are in a module whose name ends in `end`; `above` as `_by_reversed` makes it."""
    wanted = end[::-1]
    first, found = bisect_left(above, (wanted, "")), set()
    while first < len(above) and above[first][0].startswith(wanted):
        found.add(above[first][1])
        first += 1
    return found


def _above(tensor: str) -> list[str]:
    """The modules that the tensor is in, innermost first."""
    parts = tensor.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(printable(name) for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

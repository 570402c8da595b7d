"""What a base offers: every weight that an adapter may name, with its shape, and where it is stored, whole or in parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ...adapters.formats.peft.names import AROUND
from ...checkpoints.checkpoint import Checkpoint
from ...files.expression import Matrix
from ..families import families_of
from .renames import Rule, respelled
from .transformers import Renaming, joined_of, parts_of, renamed


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `checkpoint` by its name, and of each weight that it offers under another.

    A stack of experts that are stored one by one is (E, out, in).
    """
    tensors = checkpoint.tensors
    offers = offers_of(tensors, checkpoint.config)
    shapes = {name: shape_of(slots, tensors) for name, slots in offers.slots.items()}
    for name, experts in offers.experts.items():
        if name not in shapes:
            shapes[name] = (len(experts), *shape_of(next(iter(experts.values())), tensors))
    return shapes | {name: info.shape for name, info in tensors.items()}


def shape_of(slots: tuple[Slot, ...], tensors: Mapping[str, Matrix]) -> tuple[int, ...]:
    """The shape of the weight that is stored in `slots` of `tensors`, as it is stored."""
    stored = [tensors[slot.tensor].shape[0 if slot.index is None else 1 :][:: -1 if slot.turned else 1] for slot in slots]
    if len(slots) == 1 and slots[0].outputs[0] == 0 and slots[0].outputs[1] == 1:
        return stored[0]
    rows = sum(int((slot.outputs[1] - slot.outputs[0]) * shape[0]) for slot, shape in zip(slots, stored, strict=True))
    return (rows, *stored[0][1:])


WHOLE = (Fraction(0), Fraction(1))


@dataclass(frozen=True)
class Slot:
    """Where a weight, or some of its outputs, are stored.

    - `tensor`: the base tensor; `index`: which matrix of it, where it is a stack of them
    - `outputs`: from where to where the outputs lie among those that are stored there, as fractions of them
    - `turned`: whether what is stored is the transpose, by what is known of its name
    """

    tensor: str
    index: int | None = None
    outputs: tuple[Fraction, Fraction] = WHOLE
    turned: bool = False

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor, as it is."""
        return self.index is None and self.outputs == WHOLE and not self.turned


@dataclass(frozen=True)
class Offers:
    """All weights of a base by their names, as transformers 5 spells them.

    - `slots`: by name, in the order of the weight's outputs
    - `experts`: of stacks that are stored one expert at a time, by name and expert; `stacks`: of those that are one tensor, by name
      that tensor and how many there are
    - `withheld`: names of parts, and of fused weights, where it is not known how the parts lie; and a tensor that is stored
    - `spellings`: the base's; `around`: what may wrap modules in a name and is left out of it; `spell` applies both
    """

    slots: Mapping[str, tuple[Slot, ...]]
    experts: Mapping[str, Mapping[int, tuple[Slot, ...]]]
    stacks: Mapping[str, tuple[str, int]]
    withheld: Mapping[str, str] = field(default_factory=dict)
    spellings: tuple[Rule, ...] = ()
    around: tuple[str, ...] = ()

    def spell(self, name: str) -> str:
        """`name` as it is spelled here."""
        return respelled(_without(name, self.around), self.spellings)

    @property
    def names(self) -> set[str]:
        """What may be asked for."""
        return {*self.slots, *self.experts}

    def find(self, name: str, index: int | None = None) -> tuple[Slot, ...]:
        """Where the weight `name`, or matrix `index` of it, is stored; empty where the base does not have it."""
        if index is None:
            return self.slots.get(name, ())
        if name in self.stacks:
            tensor, count = self.stacks[name]
            return (Slot(tensor, index),) if 0 <= index < count else ()
        return self.experts.get(name, {}).get(index, ())

    def experts_of(self, name: str) -> set[int]:
        """Which experts the stack `name` has; empty where it is none."""
        return set(range(self.stacks[name][1])) if name in self.stacks else set(self.experts.get(name, ()))


EXPERTS: tuple[Rule, ...] = (
    ("experts.*.w1", "experts.*.gate_proj"),
    ("experts.*.w3", "experts.*.up_proj"),
    ("experts.*.w2", "experts.*.down_proj"),
    ("experts.gate_up_projs.*", "experts.*.gate_up_proj"),
    ("experts.down_projs.*", "experts.*.down_proj"),
)
"""What the projections of an expert are called in Mixtral, in Unsloth's gpt-oss, and in most others."""

QKV: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
GATE_UP: tuple[str, ...] = ("gate_proj", "up_proj")
_GATE_UP = "gate_up_proj"
FUSED = {"qkv_proj": QKV, _GATE_UP: GATE_UP, "up_gate_proj": GATE_UP[::-1]}
"""By the last name of a fused module, its parts in order."""

EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)\.weight")
_STACK = re.compile(r"(?P<stack>.+\.experts)\.(?P<leaf>[^.]+?)(?:\.weight)?")
_IN_PROJ = re.compile(r"(?P<around>.+)\.in_proj_(?P<kind>weight|bias)")
_LINEAR = re.compile(r"(?P<around>.+)\.(?P<leaf>[^.]+)\.(?P<kind>weight|bias)")


def offers_of(tensors: Mapping[str, Matrix], config: Mapping[str, Any] | None, steps: tuple[Renaming, ...] = ()) -> Offers:
    """What the base with `tensors` and `config` offers; under the names that `steps` lead to, where there are any."""
    families = families_of(config)
    spellings = (*EXPERTS, *(rule for family in families for rule in family.spellings))
    named = {part for name in tensors for part in name.split(".") if part in _AROUND}
    around: tuple[str, ...] = AROUND if "module" in named else _AROUND
    plain = {name: _without(name, AROUND) for name in tensors}
    called = renamed(plain.values(), steps) if steps else {}
    spelled = {respelled(called.get(now, now), spellings): name for name, now in plain.items()}
    if len(spelled) < len(tensors):  # both spellings are there, so neither is the other's
        spellings, around, spelled = (), (), {name: name for name in tensors}
    slots: dict[str, tuple[Slot, ...]] = {name: (Slot(tensor),) for name, tensor in spelled.items()}
    shapes = {name: tensors[tensor].shape for name, tensor in spelled.items()}
    stacks = {name: (spelled[name], shape[0]) for name, shape in shapes.items() if len(shape) == 3}
    withheld: dict[str, str] = {}
    in_order = bool(families) and all(family.fused == "joined" for family in families)
    for name, part, known in _parts(spelled, tensors, config, in_order):
        if known:
            slots.setdefault(name, (part,))
        else:
            withheld[name] = part.tensor
    for name, tensor in spelled.items() if steps else ():
        for leaf, share in parts_of(name, steps):
            slots.setdefault(leaf, (Slot(tensor, None, share),))
    for whole, apart in joined_of(spelled, steps).items() if steps else ():
        slots.setdefault(whole, tuple(Slot(spelled[one]) for one in apart))
    experts = _stacked(spelled)
    for name, parts in _joined(spelled).items():
        if in_order or len(parts) == 1:
            slots.setdefault(name, parts)
        else:
            withheld[name] = parts[0].tensor
    for name, each in list(experts.items()):
        first = next(iter(each.values()))
        if len(first) > 1 and not in_order:
            del experts[name]
            withheld[name] = first[0].tensor
    return Offers(slots, experts, stacks, withheld, spellings, around)


_AROUND = (*AROUND, "module")
"""What may wrap a module: `module`, which DataParallel and others write, only where no module of the base is called so."""


def _without(name: str, around: tuple[str, ...]) -> str:
    if not any(part in name for part in around):
        return name
    return ".".join(part for part in name.split(".") if part not in around)


def _stacked(spelled: Mapping[str, str]) -> dict[str, dict[int, tuple[Slot, ...]]]:
    """Experts that are stored one by one, under the name that a stack of them would have."""
    stacks: dict[str, dict[int, tuple[Slot, ...]]] = {}
    for name, tensor in spelled.items():
        if not (found := EXPERT.fullmatch(name)):
            continue
        stack, index, leaf = found["stack"], int(found["index"]), found["leaf"]
        stacks.setdefault(f"{stack}.{leaf}", {})[index] = (Slot(tensor),)
        if leaf != GATE_UP[0]:
            continue
        parts = [spelled.get(f"{stack}.{index}.{part}.weight") for part in GATE_UP]
        if None not in parts:
            stacks.setdefault(f"{stack}.{_GATE_UP}", {})[index] = tuple(Slot(str(part)) for part in parts)
    return stacks


def _joined(spelled: Mapping[str, str]) -> dict[str, tuple[Slot, ...]]:
    """Projections that are stored apart, under the name that a fused one would have; and what attention calls `in_proj_weight`."""
    joined: dict[str, tuple[Slot, ...]] = {}
    for name, tensor in spelled.items():
        if found := _IN_PROJ.fullmatch(name):
            joined[f"{found['around']}.{found['kind']}"] = (Slot(tensor),)
        if not (found := _LINEAR.fullmatch(name)):
            continue
        for whole, parts in FUSED.items():
            apart = [spelled.get(f"{found['around']}.{part}.{found['kind']}") for part in parts]
            if found["leaf"] == parts[0] and None not in apart:
                joined[f"{found['around']}.{whole}.{found['kind']}"] = tuple(Slot(str(part)) for part in apart)
    return joined


def _parts(
    spelled: Mapping[str, str], tensors: Mapping[str, Matrix], config: Mapping[str, Any] | None, in_order: bool
) -> Iterable[tuple[str, Slot, bool]]:
    """The parts of what is stored fused, under the names that they would have alone, and whether it is known where they lie."""
    for name, tensor in spelled.items():
        shape = tensors[tensor].shape
        if len(shape) == 3 and (found := _STACK.fullmatch(name)):
            leaves = GATE_UP if found["leaf"] == _GATE_UP else (found["leaf"],)
            for index in range(shape[0]):
                if len(leaves) > 1:
                    yield f"{found['stack']}.{index}.{found['leaf']}.weight", Slot(tensor, index), True
                for leaf, share in zip(leaves, _shares([1] * len(leaves)), strict=True):
                    yield f"{found['stack']}.{index}.{leaf}.weight", Slot(tensor, index, share), in_order or len(leaves) == 1
        elif found := _IN_PROJ.fullmatch(name):  # torch's own order, whatever the model
            for leaf, share in zip(QKV, _shares([1, 1, 1]), strict=True):
                yield f"{found['around']}.{leaf}.{found['kind']}", Slot(tensor, None, share), True
        elif (found := _LINEAR.fullmatch(name)) and found["leaf"] in FUSED:
            leaves = FUSED[found["leaf"]]
            sizes = [1] * len(leaves) if leaves is not QKV else _heads(config)
            for leaf, share in zip(leaves, _shares(sizes or [1] * len(leaves)), strict=True):
                yield f"{found['around']}.{leaf}.{found['kind']}", Slot(tensor, None, share), in_order and sizes is not None


def _shares(sizes: list[int]) -> list[tuple[Fraction, Fraction]]:
    total = sum(sizes)
    return [(Fraction(sum(sizes[:i]), total), Fraction(sum(sizes[: i + 1]), total)) for i in range(len(sizes))]


def _heads(config: Mapping[str, Any] | None) -> list[int] | None:
    """How many heads query, key and value have in the model, or in its text model; None where the configuration does not say.

    A number that is not of the weight in question cannot do harm: the update would not have the rows that it leads to.
    """
    for part in (config or {}, (config or {}).get("text_config") or {}):
        queries = part.get("num_attention_heads") if isinstance(part, Mapping) else None
        keys = part.get("num_key_value_heads", queries) if isinstance(part, Mapping) else None
        if type(queries) is int and queries > 0:
            return [queries, *[keys if type(keys) is int and keys > 0 else queries] * 2]
    return None

"""Where an update lands, and how that follows from the slots that its weight is stored in: which rows, which way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from ..adapters.adapter import Adapter, AdapterModule
from ..checkpoints.checkpoint import Checkpoint
from ..errors import ShapeMismatchError, UnsupportedAdapterError, printable
from ..files.expression import Matrix
from .names.offers import WHOLE, Slot, shape_of
from .orientation import Way, expert_orientation, matrix_orientation
from .replacements import check_mergeable


@dataclass(frozen=True)
class Target:
    """Where an update lands.

    - `tensor`: the base tensor's name
    - `transposed`: whether it is stored (in_features, out_features)
    - `rows`: which rows (start, stop) of the tensor, seen as a matrix as it is stored, the update is for; None for all of them
    - `section`: which rows (start, stop) of ΔW, as its layer has it, land there; None for all of them
    - `why`: what decided that, where it had to be decided
    """

    tensor: str
    transposed: bool = False
    why: str = ""
    rows: tuple[int, int] | None = None
    section: tuple[int, int] | None = None


_CONV = "a convolution; if it has dilation or a padding_mode other than zeros, PEFT trained a function that no weight holds"


def targets_of(
    module: AdapterModule,
    slots: tuple[Slot, ...],
    present: Mapping[str, Matrix],
    adapter: Adapter,
    checkpoint: Checkpoint,
    told: Way | None = None,
) -> tuple[Target, ...]:
    """The targets of the update of `module` in `slots`.

    - `present`: by name, the base's tensors, or the adapter's that replace them: what is added to
    - `told`: of experts, whether the other stacks of their module are stored (in, out) as the adapter sees them; of a square
      weight, which way round it is stored, where the whole of the adapter tells; None: not known

    Raises `ShapeMismatchError` where it does not fit, `AmbiguousNameError` where it fits both ways and nothing tells,
    `UnsupportedAdapterError` where the place cannot hold it, `CheckpointError` for a tensor that nothing can be added to.
    """
    for slot in slots:
        check_mergeable(checkpoint.tensors.get(slot.tensor, present[slot.tensor]), slot.tensor, checkpoint)
    shape, where = module.shape, f"{printable(adapter.name)}: {printable(module.name)}"
    if len(slots) == 1 and slots[0].whole:
        info = present[slots[0].tensor]
        stored = shape if module.groups == 1 else (shape[0], shape[1] // module.groups, *shape[2:])
        if info.shape not in (stored, stored[::-1] if len(shape) == 2 else stored):
            _misfit(module, slots, present, adapter, checkpoint)
        if len(shape) != 2:
            return (Target(slots[0].tensor, why=_CONV if len(shape) > 2 and module.tensor.endswith(".weight") else ""),)
        if module.embedding:
            if info.shape != shape:
                shown = f"{list(info.shape)}, expected {list(shape)}"
                raise ShapeMismatchError(f"{where}: the embedding {printable(slots[0].tensor)} is {shown}")
            return (Target(slots[0].tensor),)
    elif len(slots) == 1 and slots[0].turned and slots[0].outputs == WHOLE:
        if len(shape) != 2 or module.embedding or present[slots[0].tensor].shape != shape[::-1]:
            _misfit(module, slots, present, adapter, checkpoint)
        if module.transform is not None:
            _check_parts(module, (), where)
        return (Target(slots[0].tensor, transposed=True, why="stored (in, out) under its makers' name"),)
    elif len(shape) > 2 or module.embedding or any(slot.turned for slot in slots):
        _misfit(module, slots, present, adapter, checkpoint)
    if len(shape) == 1:
        if any(len(present[slot.tensor].shape) != 1 for slot in slots) or shape_of(slots, present) != shape:
            _misfit(module, slots, present, adapter, checkpoint)
        return bias_targets(slots, present)
    targets = tuple(_target(module, slot, len(slots) == 1, present, adapter, checkpoint, told) for slot in slots)
    if len(slots) > 1 or targets[0].rows is not None:
        _check_parts(module, targets, where)
    return targets if len(slots) == 1 else _sections(module, slots, targets, present, adapter, checkpoint)


def _check_parts(module: AdapterModule, targets: tuple[Target, ...], where: str) -> None:
    """What rescales or splits a weight as a whole cannot be done to a part of one; DoRA's outputs are each for themselves."""
    kind: str | None = None if module.residual is None else module.residual.kind
    kind = kind if module.transform is None else module.transform.kind
    if module.magnitude is not None and (module.magnitude_axis == 1 or any(target.transposed for target in targets)):
        kind = "DoRA with a scale for each input" if module.magnitude_axis == 1 else "DoRA"
    if kind is not None:
        raise UnsupportedAdapterError(
            f"{where} is {kind} on a weight that this base holds fused with others or in parts, and is not merged there",
            hint="nothing was written; merge into a checkpoint that stores this weight as one tensor",
        )


def _target(
    module: AdapterModule,
    slot: Slot,
    alone: bool,
    present: Mapping[str, Matrix],
    adapter: Adapter,
    checkpoint: Checkpoint,
    told: Way | None,
) -> Target:
    """The target in one slot; `alone` where all of ΔW is for it. The rows of ΔW that are for it are not told yet."""
    stored = present[slot.tensor].shape[0 if slot.index is None else 1 :]
    share = slot.outputs[1] - slot.outputs[0]
    out, inner = module.shape
    if len(stored) != 2:
        _misfit(module, (slot,), present, adapter, checkpoint)
    rows, columns = stored
    straight = columns == inner and (share * rows == out if alone else (share * rows).denominator == 1)
    turned = rows == inner and (share * columns == out if alone else (share * columns).denominator == 1)
    if not straight and not turned:
        _misfit(module, (slot,), present, adapter, checkpoint)
    where = f"{printable(adapter.name)}: {printable(module.name)}"
    if slot.index is None and module.index is None:
        expected = f"{where} as [{inner}, {out}], found {list(stored)}"
        transposed, why = matrix_orientation(slot.tensor, (straight, turned), expected, adapter, checkpoint, told)
    else:
        parameter, config = module.index is not None, checkpoint.config
        if module.exchanged:  # it is as the base has it, whatever its adapter was trained on
            straight, turned = True, False
        transposed, why = expert_orientation(
            slot.tensor, straight, turned, adapter, config, where, parameter=parameter, others=None if told is None else told[0]
        )
    if slot.whole:
        return Target(slot.tensor, transposed, why)
    start, stop = 0, rows
    if slot.outputs != WHOLE:
        if transposed:
            raise UnsupportedAdapterError(
                f"{where} is for some of the columns of {printable(slot.tensor)}, whose experts are stored (in, out)",
                hint="nothing was written; train on the fused weight, or merge into a checkpoint with experts one by one",
            )
        start, stop = (int(end * rows) for end in slot.outputs)
        why = "a part of a fused weight" + (f" and {why}" if why else "")
    offset = (slot.index or 0) * rows
    return Target(slot.tensor, transposed, why, rows=(offset + start, offset + stop))


def bias_targets(slots: tuple[Slot, ...], present: Mapping[str, Matrix]) -> tuple[Target, ...]:
    """The targets of a bias that is stored in `slots` of the vectors `present`, its numbers one part after another."""
    found, start = [], 0
    for slot in slots:
        size = present[slot.tensor].shape[0]
        low, high = (int(end * size) for end in slot.outputs)
        section = (start, start + high - low) if len(slots) > 1 else None
        found.append(Target(slot.tensor, rows=_unless_all(low, high, size), section=section))
        start += high - low
    return tuple(found)


def _unless_all(start: int, stop: int, rows: int) -> tuple[int, int] | None:
    return None if (start, stop) == (0, rows) else (start, stop)


def _sections(
    module: AdapterModule,
    slots: tuple[Slot, ...],
    targets: tuple[Target, ...],
    present: Mapping[str, Matrix],
    adapter: Adapter,
    checkpoint: Checkpoint,
) -> tuple[Target, ...]:
    """`targets` with the rows of ΔW that are for each, one after the other."""
    placed, start = [], 0
    for slot, target in zip(slots, targets, strict=True):
        rows, columns = present[slot.tensor].shape[-2:]
        size = int((slot.outputs[1] - slot.outputs[0]) * (columns if target.transposed else rows))
        why = f"stored as {len(slots)} tensors, of which each gets its rows" + (f", {target.why}" if target.why else "")
        placed.append(replace(target, why=why, section=(start, start + size)))
        start += size
    if start != module.shape[0]:
        _misfit(module, slots, present, adapter, checkpoint)
    return tuple(placed)


def _misfit(
    module: AdapterModule, slots: tuple[Slot, ...], present: Mapping[str, Matrix], adapter: Adapter, checkpoint: Checkpoint
) -> NoReturn:
    base = printable(str(checkpoint.root))
    found = [f"{printable(slot.tensor)} in {base} is {_stored(slot, present[slot.tensor])}" for slot in slots]
    raise ShapeMismatchError(
        f"{printable(adapter.name)}: {printable(module.name)} has lora_A {list(module.lora_A.shape)} and lora_B"
        f" {list(module.lora_B.shape)}, so ΔW is {list(module.shape)}, but {', '.join(found)}",
        hint="nothing was written; check that the adapter was trained on this base model",
    )


def _stored(slot: Slot, info: Matrix) -> str:
    """What is stored there, in a few words."""
    shown = f"{list(info.shape)} ({printable(info.dtype)})"
    if slot.index is not None:
        shown += f", of which expert {slot.index}"
    if slot.outputs != WHOLE:
        shown += f", of whose outputs those from {slot.outputs[0]} to {slot.outputs[1]} of all"
    return shown

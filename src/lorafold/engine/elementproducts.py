"""The addends of a step where some are LoHa or LoKr: products element by element, and nothing that these cannot be added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..adapters.numbers import AdapterReader
from ..kernel.elementwise import ElementwiseSum, ElementwiseUpdate
from ..planning.plan import Addend, Step


def elementwise_of(step: Step, readers: Sequence[AdapterReader]) -> ElementwiseSum | None:
    """What `step` adds to its matrix; None where that takes factors: nothing is a product, or it is of a part, or DoRA's."""
    modules = [readers[addend.adapter].adapter.modules[addend.module] for addend in step.addends]
    if step.rows or not all(_is_plain(addend) for addend in step.addends) or not any(module.product for module in modules):
        return None
    updates = []
    for addend, module in zip(step.addends, modules, strict=True):
        update = replace(readers[addend.adapter].elementwise(module), scaling=addend.scaling)
        updates.append(update.T if addend.transposed else update)
    return ElementwiseSum(tuple(sorted(updates, key=_key) if len(updates) > 1 else updates))


def same_elements(one: ElementwiseSum | None, other: ElementwiseSum | None) -> bool:
    """Whether both add the same."""
    if one is None or other is None:
        return one is other
    return [_key(update) for update in one.updates] == [_key(update) for update in other.updates] and all(
        a.equal(b) for x, y in zip(one.updates, other.updates, strict=True) for a, b in zip(_tensors(x), _tensors(y), strict=True)
    )


def _is_plain(addend: Addend) -> bool:
    """Whether it is only added, and to all of the matrix."""
    whole = addend.rows is None and addend.section is None and addend.part == "weight"
    return whole and addend.dora is None and addend.residual is None and addend.transform is None


def _key(update: ElementwiseUpdate) -> tuple[float, ...]:
    """By content: the order of adapters is to change no bit of `fast`."""
    tensors = _tensors(update)
    return (update.kronecker, update.scaling, len(tensors), *(float(tensor.double().sum()) for tensor in tensors))


def _tensors(update: ElementwiseUpdate) -> list[Tensor]:
    return [tensor for side in update.sides for tensor in (side.lora_A, side.lora_B) if tensor is not None]

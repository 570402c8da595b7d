"""Updates of stacks of experts that a base stores in parts: brought to the way round in which the parts lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..adapters.adapter import Adapter, AdapterModule
from ..checkpoints.checkpoint import Checkpoint
from ..errors import printable
from ..files.expression import Matrix
from .names.offers import Slot, shape_of
from .orientation import expert_orientation


def straightened(
    adapter: Adapter,
    slots: Mapping[str, tuple[Slot, ...]],
    present: Mapping[str, Matrix],
    checkpoint: Checkpoint,
    turned: Mapping[str, bool],
) -> Adapter:
    """`adapter` with the updates of experts turned round that were trained on a stack seen as (in, out) and go to parts (out, in).

    PEFT up to 0.18 saw every stack so. ΔW is the transpose of B @ A then, Aᵀ @ Bᵀ: of the same rank, its outputs the columns of A.

    Raises `AmbiguousNameError` where a square one may be either.
    """
    modules: dict[str, AdapterModule] = {}
    for name, module in adapter.modules.items():
        found = slots[name]
        if module.index is not None and not module.exchanged and len(found) > 1 and len(module.shape) == 2:
            straight = shape_of(found, present)
            ways = {way for way, shape in ((False, straight), (True, straight[::-1])) if module.shape == shape}
            where, others = f"{printable(adapter.name)}: {printable(name)}", turned.get(module.tensor.rpartition(".")[0])
            if len(ways) == 2:
                tensor, config = found[0].tensor, checkpoint.config
                ways = {expert_orientation(tensor, True, True, adapter, config, where, parameter=True, others=others)[0]}
            if ways == {True}:
                module = module.turned()
        modules[name] = module
    return replace(adapter, modules=modules)

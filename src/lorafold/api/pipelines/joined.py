"""Plans and proofs of several components as one; tensors and files are called after their component, as `unet/…`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...adapters.adapter import WeightedAdapter
from ...engine.proof import Proof
from ...errors import PlanError
from ...planning.plan import MergePlan, PlannedAdapter


def joined_plans(
    base: Path, adapters: Sequence[WeightedAdapter], plans: Mapping[str, MergePlan], left_out: Sequence[str] = ()
) -> MergePlan:
    """One plan to show, of those of the components and what was `left_out` of the adapters; it cannot be run."""
    if not plans:
        raise PlanError("there is no adapter to merge")
    first = next(iter(plans.values()))
    given: dict[str, PlannedAdapter] = {}
    for planned in (planned for plan in plans.values() for planned in plan.adapters):
        other = given.get(planned.sha256, planned)
        left = {name: why for name, why in planned.left_out.items() if name in other.left_out}  # in no component
        given[planned.sha256] = replace(planned, left_out=left)
    order = {weighted.adapter.sha256: i for i, weighted in enumerate(adapters)}

    def place(plan: MergePlan, adapter: int) -> int:
        return order[plan.adapters[adapter].sha256]

    shards = tuple(
        replace(
            shard,
            name=f"{name}/{shard.name}",
            steps=tuple(
                replace(
                    step,
                    tensor=f"{name}/{step.tensor}",
                    source=None if step.source is None else f"{name}/{step.source}",
                    addends=tuple(replace(addend, adapter=place(plan, addend.adapter)) for addend in step.addends),
                    rows=tuple(replace(rows, adapter=place(plan, rows.adapter)) for rows in step.rows),
                    adapter=None if step.adapter is None else place(plan, step.adapter),
                )
                for step in shard.steps
            ),
        )
        for name, plan in plans.items()
        for shard in plan.shards
    )
    return replace(
        first,
        base=str(base),
        adapters=tuple(given[weighted.adapter.sha256] for weighted in adapters),
        shards=shards,
        config={f"{name}/{field}": value for name, plan in plans.items() for field, value in plan.config.items()},
        notes=tuple(dict.fromkeys(f"{name}: {note}" for name, plan in plans.items() for note in plan.notes)),
        unmatched=(*left_out, *(f"{name}/{left}" for name, plan in plans.items() for left in plan.unmatched)),
    )


def joined_proofs(proofs: Mapping[str, Proof]) -> Proof:
    """The proof of all components."""
    return Proof(
        tensors={f"{name}/{tensor}": each for name, proof in proofs.items() for tensor, each in proof.tensors.items()},
        files={f"{name}/{file}": sha256 for name, proof in proofs.items() for file, sha256 in proof.files.items()},
        failures=tuple(f"{name}: {failure}" for name, proof in proofs.items() for failure in proof.failures),
        nbytes=sum(proof.nbytes for proof in proofs.values()),
        kept={f"{name}/{tensor}": kept for name, proof in proofs.items() for tensor, kept in proof.kept.items()},
        notes=tuple(f"{name}: {note}" for name, proof in proofs.items() for note in proof.notes),
    )

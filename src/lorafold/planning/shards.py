"""Which output tensor goes into which file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError, printable
from .plan import MergePlan, PlannedShard, Step
from .plan import nbytes as nbytes


def lay_out(steps: Mapping[str, Step], checkpoint: Checkpoint, max_shard_size: int | None) -> tuple[PlannedShard, ...]:
    """The output files: those of the base, each new tensor with the one that it was made of; or files of `max_shard_size` bytes.

    Raises `PlanError` where `max_shard_size` is not positive.
    """
    if max_shard_size is not None:
        return _packed(list(steps.values()), max_shard_size, checkpoint.stem)
    weight_map = checkpoint.weight_map
    by_shard: dict[str, list[Step]] = {shard.name: [] for shard in checkpoint.shards}
    for step in steps.values():
        by_shard[weight_map.get(step.tensor) or weight_map[step.source or ""]].append(step)
    return tuple(PlannedShard(name, tuple(by_shard[name])) for name in by_shard if by_shard[name])


def needs_index(plan: MergePlan, checkpoint: Checkpoint) -> bool:
    """Whether an index lists the output's files: not where all is in the one that readers look for first."""
    names = [shard.name for shard in plan.shards]
    return len(names) > 1 or (checkpoint.indexed and names != [f"{checkpoint.stem}.safetensors"])


def _packed(steps: Sequence[Step], limit: int, stem: str) -> tuple[PlannedShard, ...]:
    if limit <= 0:
        raise PlanError(f"max_shard_size must be positive, not {limit}")
    groups: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        if groups[-1] and size + nbytes(step) > limit:
            groups.append([])
            size = 0
        groups[-1].append(step)
        size += nbytes(step)
    if len(groups) == 1:
        return (PlannedShard(f"{stem}.safetensors", tuple(groups[0])),)
    if len(groups) > 99_999:
        raise PlanError(f"max_shard_size {limit} would make {len(groups)} files, the first of {printable(groups[0][0].tensor)}")
    return tuple(
        PlannedShard(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group)) for i, group in enumerate(groups, start=1)
    )

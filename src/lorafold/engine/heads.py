"""The first bytes of a file of the output, up to its tensors. Writing and proving both start from here."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..files.safetensors.info import TensorInfo, TensorSpec
from ..files.safetensors.layout import encode_header
from ..planning.metadata import metadata_of
from ..planning.plan import MergePlan, PlannedShard
from ..planning.shards import nbytes


def head_of(
    shard: PlannedShard, plan: MergePlan, checkpoint: Checkpoint, path: Path = Path()
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The head of the file `shard` of `plan`, and its tensors in the order of their bytes, as if it were at `path`."""
    metadata = metadata_of(shard, checkpoint, plan.options.max_shard_size).kept
    return encode_header(specs_of(shard, checkpoint), metadata, path)


def specs_of(shard: PlannedShard, checkpoint: Checkpoint) -> list[TensorSpec]:
    """The tensors of the file `shard`, in the order of the plan."""
    specs = []
    for step in shard.steps:
        source = checkpoint.tensors[step.source] if step.action == "copy" and step.source is not None else None
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, nbytes(step) if source is None else source.nbytes))
    return specs

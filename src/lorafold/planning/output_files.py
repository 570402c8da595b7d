"""The files of the output: which tensor goes into which, and the header of each, with its metadata. Writing and proving start here.

Programs read a model's configuration and its quantisation from the metadata, so each field is kept unless the merge makes it false.
Which ones that can happen to is told by name, below: what any other field says is for those who read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError, printable
from ..files.safetensors.header import PT_METADATA, encode_header
from ..files.safetensors.info import TensorInfo, TensorSpec
from .plan import MergePlan, PlannedShard, Step
from .plan import nbytes as nbytes


def lay_out(steps: Mapping[str, Step], checkpoint: Checkpoint, max_shard_size: int | None) -> tuple[PlannedShard, ...]:
    """The output files: those of the base, each new tensor with the one that it was made of; or files of `max_shard_size` bytes.

    Raises `PlanError` where `max_shard_size` is not positive.
    """
    if max_shard_size is not None:
        return _packed(list(steps.values()), max_shard_size, checkpoint.stem)
    if checkpoint.gguf is not None:  # of which all parts become one
        return (PlannedShard(OUT_GGUF, tuple(steps.values())),)
    weight_map = checkpoint.weight_map
    by_shard: dict[str, list[Step]] = {shard.name: [] for shard in checkpoint.shards}
    for step in steps.values():
        beside = steps.get(f"{step.tensor.removesuffix('bias')}weight", step) if step.source is None else step
        by_shard[weight_map.get(step.tensor) or weight_map[beside.source or ""]].append(step)  # codes are where their weight is
    return tuple(PlannedShard(name, tuple(by_shard[name])) for name in by_shard if by_shard[name])


OUT_GGUF = "model.gguf"
"""What an output in GGUF is called in its plan and its receipt, whatever its path is."""


def needs_index(plan: MergePlan, checkpoint: Checkpoint) -> bool:
    """Whether an index lists the output's files: not where all is in the one that readers look for first."""
    names = [shard.name for shard in plan.shards]
    return checkpoint.gguf is None and (len(names) > 1 or (checkpoint.indexed and names != [f"{checkpoint.stem}.safetensors"]))


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


OF_THE_BYTES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "sha256", "md5", "hash", "model_hash", "checksum")
"""Hashes of the tensors of the very file. Stability-AI/ModelSpec, README.md: ``modelspec.hash_sha256``; kohya-ss/sd-scripts,
`precalculate_safetensors_hashes`: the two that begin with ``sshs_``. Hashes of what a model was trained from stay true."""

OF_THE_DTYPE = ("dtype", "torch_dtype", "weight_dtype", "precision", "quantization", "quantization_config")
"""What numbers are stored as. ModelSpec's ``unet_dtype`` and ``vae_dtype`` are what a model may be run in, and stay true."""

OF_LAYERS = "_quantization_metadata"
"""ComfyUI's: ``{"layers": {NAME: {"format": …}}}``, how the weight of each layer is stored (`comfy/utils.py`)."""


OF_TORCHAO = "tensor_names"
"""torchao's list of the tensors that are of its classes; each has a field of its own name (`torchao/prototype/safetensors`)."""


@dataclass(frozen=True)
class Metadata:
    """Remarks of one file of the output: `kept`, with ``format`` among them; and why others of the base's are `left_out`."""

    kept: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)


def metadata_of(shard: PlannedShard, checkpoint: Checkpoint, max_shard_size: int | None = None) -> Metadata:
    """The metadata of the output's file `shard`: those of the base's file of that name.

    Where files are divided anew, by `max_shard_size`, those that all of the base's have alike.
    """
    found, left_out = _of_base(shard, checkpoint, max_shard_size)
    cast = {
        step.tensor
        for step in shard.steps
        if step.source is not None and step.action not in ("copy", "encode") and checkpoint.tensors[step.source].dtype != step.dtype
    }
    source = next((each for each in checkpoint.shards if each.name == shard.name), None)
    same = (
        source is not None
        and all(step.action == "copy" and step.source == step.tensor for step in shard.steps)
        and source.header.tensors.keys() == {step.tensor for step in shard.steps}
    )
    kept: dict[str, str] = {}
    for name, value in found.items():
        if name in OF_THE_BYTES and not same:
            left_out[name] = "it is a hash of the tensors as they were"
        elif (name in OF_THE_DTYPE and cast) or (name == OF_LAYERS and _is_of(value, cast)):
            left_out[name] = "tensors are stored in another dtype than it says"
        elif name in cast or (name == OF_TORCHAO and cast):
            left_out[name] = "it says how a tensor was quantised, which is not any more"
        elif name == "format" and value != PT_METADATA["format"]:
            left_out[name] = f"it is '{PT_METADATA['format']}' now, not '{printable(value)[:40]}'"
            kept[name] = PT_METADATA["format"]
        else:
            kept[name] = value
    return Metadata({**kept, **{name: value for name, value in PT_METADATA.items() if name not in kept}}, left_out)


def metadata_notes(shards: Sequence[PlannedShard], checkpoint: Checkpoint, max_shard_size: int | None = None) -> list[str]:
    """What is left out of the metadata of the base's files, in words: the files of one field and reason together."""
    files: dict[tuple[str, str], list[str]] = {}
    for shard in shards if checkpoint.gguf is None else ():
        for name, why in metadata_of(shard, checkpoint, max_shard_size).left_out.items():
            files.setdefault((name, why), []).append(shard.name)
    return [
        f"the metadata field '{printable(name)[:80]}' of {printable(names[0])}"
        f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        f" is {'rewritten' if name in PT_METADATA else 'left out'}: {why}"
        for (name, why), names in files.items()
    ]


def _of_base(shard: PlannedShard, checkpoint: Checkpoint, max_shard_size: int | None) -> tuple[dict[str, str], dict[str, str]]:
    """What the base says of the tensors of `shard`, and what it says of some of its files alone."""
    every = [each.header.metadata for each in checkpoint.shards]
    if max_shard_size is None or len(every) == 1:
        own = next((each.header.metadata for each in checkpoint.shards if each.name == shard.name), every[0] if every else {})
        return dict(own), {}
    common = {name: value for name, value in every[0].items() if all(each.get(name) == value for each in every)}
    others = dict.fromkeys(
        (name for each in every for name in each if name not in common), "not all files of the base have it alike"
    )
    return common, {name: why for name, why in others.items() if name not in PT_METADATA}


def _is_of(value: str, cast: set[str]) -> bool:
    """Whether the metadata field speaks of the weight of one of the layers that were `cast`; names may lack what all begin with."""
    try:
        layers: Any = json.loads(value)["layers"]
        names = {f"{layer}.weight" for layer in layers}
    except (ValueError, TypeError, KeyError, RecursionError):
        return bool(cast)
    return any(tensor[at:] in names for tensor in cast for at in _starts(tensor))


def _starts(name: str) -> list[int]:
    """Where each part of a dotted name begins."""
    return [0, *(i + 1 for i, char in enumerate(name) if char == ".")]


def head_of(
    shard: PlannedShard, plan: MergePlan, checkpoint: Checkpoint, path: Path = Path()
) -> tuple[bytes, tuple[TensorInfo, ...]]:
    """The header of the file `shard` of `plan`, and its tensors in the order of their bytes, as if it were at `path`."""
    metadata = metadata_of(shard, checkpoint, plan.options.max_shard_size).kept
    return encode_header(specs_of(shard, checkpoint), metadata, path)


def specs_of(shard: PlannedShard, checkpoint: Checkpoint) -> list[TensorSpec]:
    """The tensors of the file `shard`, in the order of the plan."""
    specs = []
    for step in shard.steps:
        source = checkpoint.as_stored[step.source] if step.action == "copy" and step.source is not None else None
        specs.append(TensorSpec(step.tensor, step.dtype, step.shape, nbytes(step) if source is None else source.nbytes))
    return specs

"""Writing an undo file: what each changed tensor of the base differs by from what the merged one gives back, in one pass.

The merged numbers are read from the files that were written, so it does not matter how they were rounded, or by which run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint, Shard
from ...checkpoints.sidecar_files import files_beside_weights
from ...errors import CheckpointError
from ...files.atomic.file import StagedFile
from ...files.digests import hash_of
from ...files.gguf.gguf_header import blank_of
from ...files.regular import open_regular, sha256_of
from ...files.safetensors.buffers import bytes_of
from ...files.safetensors.growing import GrowingWriter
from ...files.safetensors.header import PT_METADATA
from ...files.safetensors.info import NAMES, TORCH_DTYPES, TensorSpec
from ...planning.plan import Step
from ...version import __version__
from ..sources import Sources
from ..threads import Workers, workers
from . import format as name_of
from .base_heads import kept_head
from .changed import Span, changed_tensors, described, is_replaced, legible, read_tile, spans, tile_count, updates_of
from .format import FIELD, FIELD_SHA256, ChangedPiece, ChangedTensor, Description, StoredFile
from .read import Place, opened
from .tiles import EncodedTile, encode, narrowed, put_back

_CHUNK = 1 << 20


@dataclass(frozen=True)
class UndoneMerge:
    """What an undo file is of.

    - `output`: the merged checkpoint; `receipt`: sha256 of its receipt; `plan`: hash of all that decided the merge
    - `files`: sha256 of its files of weights, by name; those that are not known are made
    - `beside`: sha256 by name of the files beside its weights
    """

    output: Checkpoint
    receipt: str
    plan: str
    files: Mapping[str, str]
    beside: Mapping[str, str]


def write_undo(
    file: StagedFile,
    sources: Sources,
    merge: UndoneMerge,
    *,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> int:
    """Fill `file` with what turns `merge`, made from `sources`, back into its base; the bytes of it, which are on the disk.

    - `on_bytes`: told of bytes of the base's tensors as they are done

    Raises `OutputError` where it cannot be written, `CheckpointError` where one of the others cannot be read.
    """
    checkpoint = sources.checkpoint
    steps = changed_tensors(sources.plan, checkpoint)
    stored = dict(files_beside_weights(checkpoint))
    hashes = {name: sha256_of(path, error=CheckpointError) for name, path in stored.items()}
    stored = {name: path for name, path in stored.items() if merge.beside.get(name) != hashes[name]}
    fixed, tensors = _layout(steps, sources)
    heads = {name_of.head(shard.name): kept_head(shard) for shard in checkpoint.shards}
    fixed += [TensorSpec(name, "U8", (len(data),), len(data)) for name, data in heads.items()]
    fixed += [TensorSpec(name_of.file(name), "U8", (size := os.stat(path).st_size,), size) for name, path in stored.items()]
    description = Description(
        version=__version__,
        receipt=merge.receipt,
        plan=merge.plan,
        output={s.name: merge.files.get(s.name) or _sha256(s) for s in merge.output.shards},
        fingerprint=sources.plan.fingerprint,
        shards=tuple(shard.name for shard in checkpoint.shards),
        files={name: StoredFile(sha256, name in stored) for name, sha256 in hashes.items()},
        config=_old_values(checkpoint, sources.plan.config),
        tensors=tensors,
    )
    growing = [(name_of.payload(name), checkpoint.stored[name].nbytes) for name in steps]
    writer = GrowingWriter(file.fd, file.path, _by_width(fixed), growing, _remarks(description))
    for name, data in heads.items():
        writer.write(name, 0, memoryview(data))
    for name, path in stored.items():
        _store(writer, name_of.file(name), path)
    digests: dict[str, str] = {}
    with opened(checkpoint) as base, opened(merge.output) as merged, workers(threads) as pool:
        for name, step in steps.items():
            changed = _Changed(step, tensors[name], (base[name][0], legible(base[name][1])), merged.get(name))
            digests[name] = _tensor(writer, changed, sources, pool, on_bytes)
    done = {name: replace(tensor, sha256=digests[name]) for name, tensor in tensors.items()}
    return writer.finish(_remarks(replace(description, tensors=done)))


def _remarks(description: Description) -> dict[str, str]:
    text = description.to_text()
    return {**PT_METADATA, FIELD: text, FIELD_SHA256: hashlib.sha256(text.encode()).hexdigest()}


def _layout(steps: Mapping[str, Step | None], sources: Sources) -> tuple[list[TensorSpec], dict[str, ChangedTensor]]:
    """The tensors of the file whose size is known, and how each changed one is cut."""
    specs: list[TensorSpec] = []
    tensors: dict[str, ChangedTensor] = {}
    stored = sources.checkpoint.stored
    for name, step in steps.items():
        info = legible(stored[name])
        found, columns = updates_of(step, info, sources)
        pieces = tuple(ChangedPiece(start, stop, tuple(u.scaling for u in updates)) for start, stop, updates in found)
        tensor = tensors[name] = described(step, info, pieces, columns)
        specs.append(_spec(name_of.table(name), "I64", (tile_count(tensor), 3)))
        for i, (_, _, updates) in enumerate(found):
            for j, update in enumerate(updates):
                for kind, factor in (("lora_A", update.lora_A), ("lora_B", update.lora_B)):
                    specs.append(_spec(name_of.factor(kind, i, j, name), NAMES[factor.dtype], tuple(factor.shape)))
        if step is not None and tensor.rows:
            indices = _indices(step)
            specs.append(_spec(name_of.row_values(name), info.dtype, (len(indices), columns)))
            specs.append(_spec(name_of.row_indices(name), "I64", (len(indices),)))
    return specs, tensors


def _spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    count = 1
    for size in shape:
        count *= size
    return TensorSpec(name, dtype, shape, count * TORCH_DTYPES[dtype].itemsize)


def _by_width(specs: list[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: -TORCH_DTYPES[spec.dtype].itemsize)


@dataclass(frozen=True)
class _Changed:
    """A tensor of the base, the step that changed it, how it is cut, and where it lies in the base and in the merged checkpoint."""

    step: Step | None
    tensor: ChangedTensor
    base: Place
    merged: Place | None


def _tensor(
    writer: GrowingWriter, changed: _Changed, sources: Sources, pool: Workers, on_bytes: Callable[[int], None] | None
) -> str:
    """Write all of one changed tensor; the sha256 of the base's."""
    step, tensor = changed.step, changed.tensor
    name = changed.base[1].name
    found, _ = updates_of(step, changed.base[1], sources)
    for i, (_, _, updates) in enumerate(found):
        for j, update in enumerate(updates):
            for kind, factor in (("lora_A", update.lora_A), ("lora_B", update.lora_B)):
                writer.write(name_of.factor(kind, i, j, name), 0, bytes_of(factor.contiguous()))
    rows = None
    if step is not None and tensor.rows:
        indices = torch.tensor(_indices(step), dtype=torch.int64, device="cpu")
        values = [read_tile(*changed.base, Span(0, 0, i, i + 1), tensor.columns) for i in indices.tolist()]
        rows = indices, torch.cat(values)
        writer.write(name_of.row_indices(name), 0, bytes_of(indices))
        writer.write(name_of.row_values(name), 0, bytes_of(rows[1]))

    def work(span: Span) -> tuple[Tensor, EncodedTile]:
        base = read_tile(*changed.base, span, tensor.columns)
        place = None if is_replaced(step) else changed.merged
        merged = None if place is None else read_tile(*place, span, tensor.columns)
        if merged is not None and rows is not None:
            put_back(merged, rows, span)
        start = found[span.piece][0] if found else 0
        return base, encode(base, merged, narrowed(found[span.piece][2], span, start) if found else ())

    digest = hashlib.sha256()
    counts = torch.empty(tile_count(tensor), 3, dtype=torch.int64, device="cpu")
    for number, (base, tile) in enumerate(pool.results(work, spans(tensor))):
        digest.update(bytes_of(base))
        counts[number] = torch.tensor([tile.near, tile.far, len(tile.data)], dtype=torch.int64, device="cpu")
        writer.append(name_of.payload(name), memoryview(tile.data))
        if on_bytes is not None:
            on_bytes(base.nbytes)
    writer.write(name_of.table(name), 0, bytes_of(counts))
    return digest.hexdigest()


def _indices(step: Step) -> list[int]:
    return [index for new in step.rows for index in new.indices]


def _old_values(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What the base's config.json has at the dotted paths of `changes`; None where it has nothing."""
    found: dict[str, Any] = {}
    for path in changes:
        place: Any = checkpoint.config
        for part in path.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        found[path] = place
    return found


def _sha256(shard: Shard) -> str:
    return hash_of(shard.path, "sha256", error=CheckpointError, blank=blank_of(shard.header))


def _store(writer: GrowingWriter, name: str, path: Path) -> None:
    with open(open_regular(path, error=CheckpointError)[0], "rb") as file:
        offset = 0
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            writer.write(name, offset, memoryview(chunk))
            offset += len(chunk)

"""The index of a sharded checkpoint: which shard holds which tensor. Reading one, strictly, and writing one.

A shard's name comes from a file that a stranger may have written, so it is checked to be a plain name before any path is made
of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, printable
from ..files import strictjson
from ..files.atomic.durable import write_text

INDEX_NAME = "model.safetensors.index.json"

_LARGEST = 256 * 1024 * 1024
"""Bytes of the longest index that is read: some hundred for each tensor."""


@dataclass(frozen=True)
class Index:
    """What an index file says: the shard's file name by tensor name, and its metadata."""

    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The shards, in the order of their names."""
        return tuple(sorted(set(self.weight_map.values())))


def read_index(path: Path) -> Index:
    """The index in the file at `path`.

    Raises `CheckpointError` where it is not JSON of the right form, lists nothing, or names a shard by anything but a plain
    file name.
    """
    shown = printable(str(path))
    parsed = strictjson.load(path, error=CheckpointError, limit=_LARGEST)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{shown} must be an object with a weight_map that is an object")
    metadata = parsed.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{shown}: metadata must be an object")
    if not weight_map:
        raise CheckpointError(f"{shown} lists no tensors")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise CheckpointError(
                f"{shown}: the tensor '{printable(name)}' is said to be in '{printable(str(shard))[:200]}',"
                " expected the plain name of a file in the same folder",
                hint="nothing was opened there; get the checkpoint from a source that you trust",
            )
    return Index(weight_map, metadata)


def is_plain_name(name: str) -> bool:
    """Whether `name` is that of a .safetensors file in a folder, on every system: no path, no drive, no control character.

    >>> [is_plain_name(name) for name in ("model-1-of-2.safetensors", "../m.safetensors", "C:m.safetensors")]
    [True, False, False]
    """
    return name.endswith(".safetensors") and name != ".safetensors" and not re.search(r"[/\\:\x00-\x1f\x7f]", name)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int, name: str = INDEX_NAME) -> Path:
    """Write the index `name` in `folder`, on disk when this returns; `total_size` is the bytes of all tensors.

    Raises `OutputError` where it cannot be written.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    path = folder / name
    write_text(path, json.dumps(index, indent=2) + "\n")
    return path

"""All the files of a checkpoint: what a copy of it must have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .checkpoint import Checkpoint
from .sidecars import companions
from .symlinks import resolve_entry

_BESIDE = ("README.md", "lorafold.json")


def files_beside_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """By name what makes up `checkpoint` beside its weights: index, what goes along with them, its model card and its receipt.

    Raises `CheckpointError` where one is a link that leaves the folder.
    """
    for path in companions(checkpoint):
        yield str(path.relative_to(checkpoint.root)), path
    if checkpoint.lone:
        return
    index = [checkpoint.index_name] if checkpoint.indexed else []
    for name in (*index, *_BESIDE):
        if (checkpoint.root / name).exists():
            resolve_entry(checkpoint.root, name)
            yield name, checkpoint.root / name

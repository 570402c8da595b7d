"""What stands beside the weights, held against what must stand there: the files' remarks, the index, config.json, and the copies.

README.md is left out: people write into it. So is the receipt, which `receipts` looks at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import CheckpointError, printable
from ..files import strictjson
from ..files.regular import open_regular
from ..files.safetensors.layout import PT_METADATA
from .beside import files_beside
from .config import edited
from .sources import Sources

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def beside_failures(output: Checkpoint, sources: Sources) -> list[str]:
    """What is wrong around the weights of `output`, in words.

    Raises `CheckpointError` where a file of the base or of an adapter cannot be read.
    """
    return [
        *_metadata_failures(output), *_index_failures(output, sources), *_other_weights(output),
        *_config_failures(output, sources), *_copy_failures(output, sources),
    ]  # fmt: skip


def _metadata_failures(output: Checkpoint) -> list[str]:
    expected = dict(PT_METADATA)
    return [
        f"{printable(shard.name)} has the metadata {str(dict(shard.header.metadata))[:200]!r}, expected {expected!r}"
        for shard in output.shards
        if dict(shard.header.metadata) != expected
    ]


def _index_failures(output: Checkpoint, sources: Sources) -> list[str]:
    if not output.indexed:
        needed = sources.checkpoint.indexed and [shard.name for shard in output.shards] != [f"{output.stem}.safetensors"]
        return [f"{output.index_name} is missing"] if needed and not output.lone else []
    expected = {"total_size": output.nbytes}
    if strictjson.canonical(output.index_metadata) == strictjson.canonical(expected):
        return []
    return [f"{output.index_name} has the metadata {str(dict(output.index_metadata))[:200]!r}, expected {expected!r}"]


def _other_weights(output: Checkpoint) -> list[str]:
    own = {shard.name for shard in output.shards} | ({output.index_name} if output.indexed else set())
    others = [] if output.lone else sorted(n for n in os.listdir(output.root) if n.endswith(_WEIGHTS) and n not in own)
    return [f"{printable(name)} is not part of the checkpoint" for name in others]


def _config_failures(output: Checkpoint, sources: Sources) -> list[str]:
    base = sources.checkpoint.config
    absent = base is None or sources.plan.options.only_changed
    expected: dict[str, Any] | None = None if absent else edited(base or {}, sources.plan.config)
    if expected is None or output.config is None:
        return [] if expected is output.config else [f"config.json {'should not be there' if expected is None else 'is missing'}"]
    fields = sorted(
        name
        for name in expected | output.config
        if name not in expected
        or name not in output.config
        or strictjson.canonical(expected[name]) != strictjson.canonical(output.config[name])
    )
    return [f"config.json differs from what it must be in {', '.join(printable(name) for name in fields)}"] if fields else []


def _copy_failures(output: Checkpoint, sources: Sources) -> list[str]:
    files, _ = ({}, []) if output.lone or sources.plan.options.only_changed else files_beside(sources.checkpoint, sources.adapters)
    return [failure for name, source in files.items() if (failure := _difference(output.root / name, source)) is not None]


def _difference(found: Path, source: Path) -> str | None:
    name = printable(found.name)
    with open(open_regular(source, error=CheckpointError)[0], "rb") as right:
        try:
            fd, _ = open_regular(found, error=CheckpointError)
        except CheckpointError:
            return f"{name} is missing"
        with open(fd, "rb") as left:
            same = all(one == other for one, other in iter(lambda: (left.read(1 << 20), right.read(1 << 20)), (b"", b"")))
    return None if same else f"{name} differs from {printable(str(source))}"

"""From a path to a `Checkpoint`: every header read, and the index held against what the shards really hold.

Other readers fill a tensor that the index names and no shard has with random numbers, and drop one that a shard has and the
index does not name. Both are errors here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, printable
from ..files import strictjson
from ..files.safetensors.header import read_header
from .checkpoint import Checkpoint, Shard
from .encodings.recognise import recognise
from .index import Index, read_index
from .locate import Location, blob_sha256, locate, resolve_entry
from .open_gguf import open_gguf
from .quantised import quantisation_in


def open_checkpoint(
    path: Path | str, *, prefer: Literal["index", "single"] | None = None, repair_index: bool = False
) -> Checkpoint:
    """The checkpoint at `path`: a folder with an index and shards, a folder with one file, a hub-cache snapshot, or one file, which
    may be a part of a model in GGUF.

    Only headers are read. `prefer` decides where a folder holds both an index and a `model.safetensors`. With `repair_index`, where
    the shards hold tensors that the index does not list, or elsewhere than it says, they are taken from where they are.

    Raises `CheckpointError` where there is no checkpoint, or its files are damaged, contradict each other or lead elsewhere.

    >>> import lorafold
    >>> base = lorafold.open_checkpoint("base")
    >>> base.name, base.indexed
    ('base', True)
    """
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return open_gguf(path)
    location = locate(path)
    root = location.root
    index = _index(location, prefer)
    notes: list[str] = []
    if index is not None and location.index is not None:
        shards = _open_shards(root, location.index, index)
        strays = [_open_shard(root, name) for name in stray_shards(os.listdir(root), index.shard_names)]
        shards = sorted([*shards, *strays], key=lambda shard: shard.name)
        notes = _check_index(root / location.index, index, shards, repair=repair_index)
    elif path.is_dir():
        shards = [_open_shard(root, str(location.single))]
    else:
        shards = [Shard(path.name, read_header(path), blob_sha256(Path(os.path.realpath(path))))]

    if not any(shard.header.tensors for shard in shards):
        raise CheckpointError(f"{printable(str(path))} holds no tensors")
    config = _config(root)
    quantisation = quantisation_in(root, config, beside=path.is_dir())
    found = recognise(tuple(shard.header for shard in shards), {} if quantisation is None else quantisation.config, config)
    return Checkpoint(
        root=root,
        shards=tuple(shards),
        tensors=found.tensors,
        config=config,
        index_metadata=index.metadata if index is not None else {},
        indexed=index is not None,
        single_file=not path.is_dir(),
        notes=tuple(notes),
        encoded=found.encoded,
        companions=found.companions,
        quantisation=quantisation,
    )


def _index(location: Location, prefer: Literal["index", "single"] | None) -> Index | None:
    """The index to go by; None where it is the one file."""
    if location.index is None or (location.single is not None and prefer == "single"):
        return None
    resolve_entry(location.root, location.index)
    index = read_index(location.root / location.index)
    if location.single is not None and prefer is None and location.single not in index.shard_names:
        raise CheckpointError(
            f"{printable(str(location.root))} holds two checkpoints: {printable(location.index)} with its shards,"
            f" and {printable(location.single)}",
            hint="one of them is stale: remove it, or say which is meant (prefer: index or single)",
        )
    return index


def _open_shards(root: Path, index_name: str, index: Index) -> list[Shard]:
    shards = []
    for name in index.shard_names:
        if not os.path.lexists(root / name):
            count = sum(shard == name for shard in index.weight_map.values())
            raise CheckpointError(
                f"{printable(str(root / name))} is missing: {printable(index_name)} says that it holds {count} tensors",
                hint="copy or download it again",
            )
        shards.append(_open_shard(root, name))
    return shards


def _open_shard(root: Path, name: str) -> Shard:
    real = resolve_entry(root, name)
    return Shard(name, read_header(root / name), blob_sha256(real))


def stray_shards(names: Sequence[str], listed: Sequence[str]) -> list[str]:
    """Those of `names` that are numbered as parts of the same whole as the `listed` ones, and are not among them.

    >>> stray_shards(["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"], ["m-00001-of-00002.safetensors"])
    ['m-00002-of-00002.safetensors']
    """
    wholes = {(found[1], found[3]) for name in listed if (found := _NUMBERED.fullmatch(name))}
    matches = ((name, _NUMBERED.fullmatch(name)) for name in sorted(names) if name not in listed)
    return [name for name, found in matches if found and (found[1], found[3]) in wholes]


_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


def _check_index(path: Path, index: Index, shards: list[Shard], *, repair: bool) -> list[str]:
    """What of the index was set right, in words; nothing where it is right."""
    shown = printable(str(path))
    holder: dict[str, str] = {}
    for shard in shards:
        for name in shard.header.tensors:
            if name in holder:
                raise CheckpointError(
                    f"{printable(str(path.parent))}: the tensor '{printable(name)}' is in two shards,"
                    f" {printable(holder[name])} and {printable(shard.name)}"
                )
            holder[name] = shard.name
    unlisted = [name for name in holder if name not in index.weight_map]
    astray = [name for name, shard in index.weight_map.items() if holder.get(name) != shard]
    if repair and all(name in holder for name in astray):
        lost = [*unlisted, *astray]
        return [f"{printable(path.name)} did not say where {_listed(lost)} are; they are taken from where they are"] if lost else []
    if unlisted:
        raise CheckpointError(
            f"{shown} does not list {len(unlisted)} tensors that its shards hold: {_listed(unlisted)}"
            f" (in {printable(holder[unlisted[0]])})",
            hint=_VERSIONS + _REPAIR,
        )
    if astray:
        name = astray[0]
        found = f"is in {printable(holder[name])}" if name in holder else "is in no shard"
        raise CheckpointError(
            f"{shown} lists {len(astray)} tensors that are not where it says: '{printable(name)}'"
            f" should be in {printable(index.weight_map[name])} and {found}",
            hint=_VERSIONS + (_REPAIR if all(name in holder for name in astray) else ""),
        )
    return []


_VERSIONS = "the index and the shards are of different versions: copy or download them again"
_REPAIR = ", or take the tensors from where they are with `repair_index=True`"


def _config(root: Path) -> dict[str, Any] | None:
    if not os.path.lexists(root / "config.json"):
        return None
    resolve_entry(root, "config.json")
    config = strictjson.load(root / "config.json", error=CheckpointError, allow_nonfinite=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{printable(str(root / 'config.json'))} must hold a JSON object")
    return config


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{printable(name)}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

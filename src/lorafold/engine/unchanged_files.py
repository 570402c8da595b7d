"""Files of the output that are files of the base, to the last byte: they need not be written where the file system can do without.

A clone (reflink) is a copy like any other, but takes no time and no room. A link is the base's file itself by a second name, and
made only where that is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint, Shard
from ..errors import printable
from ..files.atomic.durable import clone_file, link_file
from ..files.atomic.journal import Finished
from ..files.regular import state_of
from ..files.safetensors.info import FileIdentity, TensorInfo
from ..planning.plan import MergePlan, PlannedShard
from .file_heads import file_head


@dataclass(frozen=True)
class UnchangedFiles:
    """What stands in the folder without having been written.

    - `files`: by name; `linked`: those of all files there that are the base's own
    - `notes`: what was found, in words
    """

    files: Mapping[str, Finished]
    linked: tuple[str, ...]
    notes: tuple[str, ...]


def take_unchanged(
    folder: Path, plan: MergePlan, checkpoint: Checkpoint, done: Mapping[str, Finished], *, link: bool = False
) -> UnchangedFiles:
    """Put the files of `plan` that would have the bytes of one of `checkpoint` into `folder` without writing them, where possible.

    - `done`: files that are there already; `link`: link rather than clone

    Raises `OutputError` where there is no room.
    """
    files: dict[str, Finished] = {}
    linked: list[str] = []
    faults: dict[str, OSError] = {}
    for shard in plan.shards:
        source = _same_file(shard, plan, checkpoint)
        if source is None:
            continue
        target = folder / shard.name
        if shard.name not in done:
            fault = link_file(source.path, target) if link else None
            if fault is not None:
                faults[shard.name] = fault
            if (fault is not None or not link) and clone_file(source.path, target) is not None:
                continue
            if not _is_still(source.path, source.header.identity):
                os.unlink(target)  # it has changed since its header was read: whoever copies it refuses it
                continue
            files[shard.name] = Finished(shard.name, "", False, {}, state_of(target))
        if _is_still(target, source.header.identity):
            linked.append(shard.name)
    nothing = ["nothing was linked: no file of the base is left as it is"] if link and not linked and not faults else []
    return UnchangedFiles(files, tuple(linked), (*nothing, *not_linked(faults)))


def _is_still(path: Path, identity: FileIdentity) -> bool:
    try:
        return FileIdentity.of(os.stat(path)) == identity
    except OSError:
        return False


def not_linked(faults: Mapping[str, OSError]) -> list[str]:
    """In words: the files that could not be linked, those of one reason together.

    >>> not_linked({"a": OSError(18, "Invalid cross-device link"), "b": OSError(18, "Invalid cross-device link")})
    ['a and 1 more could not be linked (Invalid cross-device link), and were copied']
    """
    reasons: dict[str, list[str]] = {}
    for name, fault in faults.items():
        reasons.setdefault(str(fault.strerror), []).append(printable(name))
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} could not be linked ({reason}), and"
        f" {'were' if len(names) > 1 else 'was'} copied"
        for reason, names in reasons.items()
    ]


def _same_file(shard: PlannedShard, plan: MergePlan, checkpoint: Checkpoint) -> Shard | None:
    """The file of the base that has the bytes that `shard` would get; None where there is none."""
    if any(step.action != "copy" or step.source != step.tensor for step in shard.steps):
        return None
    tensors = (checkpoint.as_stored[step.tensor] for step in shard.steps)
    infos = [tensor for tensor in tensors if isinstance(tensor, TensorInfo)]
    if [info.name for info in infos] != [step.tensor for step in shard.steps]:
        return None  # some are not stored as they are, or within others
    source = next((each for each in checkpoint.shards if each.path == infos[0].path), None)
    if source is None or len(infos) != len(source.header.tensors) or any(info.path != source.path for info in infos):
        return None
    head = file_head(shard, plan, checkpoint)
    return source if hashlib.sha256(head.raw).hexdigest() == source.header.sha256 else None

"""Files of the output that are files of the base, to the last byte: they can be its own, by a second name, in place of copies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Checkpoint, Shard
from ..errors import printable
from ..planning import MergePlan, PlannedShard
from ..regularfile import state_of
from ..staging import Finished, link_file
from ..tensorfile import FileIdentity, encode_header


def link_untouched(
    folder: Path, plan: MergePlan, checkpoint: Checkpoint, done: Mapping[str, Finished]
) -> tuple[dict[str, Finished], list[str]]:
    """Put every file of `plan` that would have the bytes of one of `checkpoint` into `folder` as a link to it.

    What `done` names is there already. Returns the files that are links now, by name, and what was found, in words; a file that
    cannot be linked is left to be copied.

    Raises `OutputError` where there is no room.
    """
    linked: dict[str, Finished] = {}
    faults: dict[str, OSError] = {}
    for shard in plan.shards:
        source = _same_file(shard, checkpoint)
        if source is None:
            continue
        target, identity = folder / shard.name, source.header.identity
        if shard.name not in done:
            fault = link_file(source.path, target)
            if fault is not None:
                faults[shard.name] = fault
                continue
            if FileIdentity.of(os.stat(target)) != identity:
                os.unlink(target)  # it has changed since its head was read: the copy refuses it
                continue
            linked[shard.name] = Finished(shard.name, "", False, {}, state_of(target))
        elif FileIdentity.of(os.stat(target)) == identity:
            linked[shard.name] = done[shard.name]
    nothing = [] if linked or faults else ["nothing was linked: no file of the base is left as it is"]
    return linked, [*nothing, *not_linked(faults)]


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


def _same_file(shard: PlannedShard, checkpoint: Checkpoint) -> Shard | None:
    """The file of the base that has the bytes that `shard` would get; None where there is none."""
    if any(step.action != "copy" or step.source != step.tensor for step in shard.steps):
        return None
    infos = [checkpoint.tensors[step.tensor] for step in shard.steps]
    source = next((each for each in checkpoint.shards if each.path == infos[0].path), None)
    if source is None or len(infos) != len(source.header.tensors) or any(info.path != source.path for info in infos):
        return None
    head, _ = encode_header([info.spec for info in infos])
    return source if hashlib.sha256(head).hexdigest() == source.header.sha256 else None

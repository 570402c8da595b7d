"""Going on with a merge that was stopped: whether its journal is of this very merge, and which of its files still hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..errors import InputError, PlanError, printable
from ..files import strictjson
from ..files.atomic.durable import keep_only
from ..files.atomic.journal import JOURNAL_NAME, Finished, finished_names, read_journal
from ..files.atomic.owner import OWNER_NAME
from ..files.atomic.prehash import sha256_found
from ..files.digests import algorithm_of, hash_of
from ..files.regular import state_of
from ..planning.plan import MergePlan, plan_to_json
from ..version import __version__


def journal_fields(plan: MergePlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides every bit of the output, by the names that an error calls them.

    A plan knows the base by its headers; here its files count as well, by size, time and inode: other numbers in the same shapes
    must not be mixed.
    """
    options = plan.options.stated()
    adapters = {f"adapter {each.name}": [each.sha256, each.adapter_weight] for each in plan.adapters}
    files = {f"base file {shard.name}": [shard.header.sha256, *_state(shard.header.identity)] for shard in checkpoint.shards}
    if checkpoint.original is not None:
        for shard in checkpoint.original.shards:
            files[f"original file {shard.name}"] = [shard.header.sha256, *_state(shard.header.identity)]
    steps = strictjson.canonical(plan_to_json(plan)["shards"])
    return {
        "lorafold": __version__,
        "adapters": [each.name for each in plan.adapters],
        **adapters,
        **options,
        **files,
        "plan": hashlib.sha256(steps.encode()).hexdigest(),
    }


def is_of(
    folder: Path,
    fields: Mapping[str, Any],
    *,
    restart: bool = False,
    worth_keeping: Callable[[Path], Collection[str]] = finished_names,
) -> bool:
    """Whether the hidden folder of a stopped run is worth going on with: there is something in it, and its journal has `fields`.

    Raises `PlanError` naming the fields that differ, unless `restart` says that the old work may go.
    """
    journal = None if restart else read_journal(folder)
    if journal is None or not worth_keeping(folder):
        return False
    old, new = journal.fields, strictjson.parse(strictjson.canonical(dict(fields)), "plan")
    differ = [name for name in dict.fromkeys((*new, *old)) if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    if differ:
        shown = [name for name in differ if name != "plan"] or differ
        words = ", ".join(_difference(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in shown[:5])
        raise PlanError(
            f"{printable(str(folder))} holds finished files of another merge to the same output, which differs in {words}",
            hint="run the command that was stopped, or add `restart=True` to begin anew",
        )
    return True


def still_whole(folder: Path, plan: MergePlan) -> tuple[dict[str, Finished], list[str]]:
    """The finished files in `folder` that still have the bytes that the journal says, and what was found, in words.

    Everything else is removed from the folder: begun files, damaged ones, and what stands beside the weights.
    """
    journal = read_journal(folder)
    whole: dict[str, Finished] = {}
    notes = []
    planned = {shard.name for shard in plan.shards}
    found = {name: entry for name, entry in (journal.finished if journal else {}).items() if name in planned}
    with ThreadPoolExecutor(os.cpu_count(), "hash") as pool:
        # the last first: others may be at the first ones already, see `begin_to_hash`
        holds = {entry.name: pool.submit(_holds, entry, folder / entry.name) for entry in reversed(found.values())}
    for name, entry in found.items():
        if holds[name].result():
            whole[name] = entry
        else:
            notes.append(f"{printable(name)}, finished by a run that was stopped, has changed since: made again")
    keep_only(folder, {OWNER_NAME, JOURNAL_NAME, *whole})
    if whole:
        notes.insert(0, f"went on where a run was stopped: {len(whole)} of {len(planned)} files were finished")
    return whole, notes


def _holds(entry: Finished, path: Path) -> bool:
    """Whether the file has the bytes it was finished with, by its hash, or by its state where it was never hashed."""
    try:
        if not entry.digest:
            return list(state_of(path)) == list(entry.state)
        algorithm = algorithm_of(entry.digest)
        return (sha256_found(path) if algorithm == "sha256" else hash_of(path, algorithm)) == entry.digest
    except InputError:
        return False


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _state(identity: Any) -> list[int]:
    return [identity.size, identity.mtime_ns, identity.inode]


def _difference(name: str, old: Any, new: Any) -> str:
    was, now = (printable(repr(value)) for value in (old, new))
    return f"{printable(name)} (was {_short(was)}, is {_short(now)})"


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:60] + "…"

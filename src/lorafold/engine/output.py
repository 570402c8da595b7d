"""A checkpoint that is written, and a file of it while it is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from ..files.atomic.journal import Finished
from ..files.regular import state_of
from ..files.safetensors.reader import Until
from ..files.safetensors.writer import ShardWriter
from ..kernel.stats import Kept
from ..planning.plan import PlannedShard
from .sources import Sources

OnBytes = Callable[[int], None]
"""Called with each number of bytes done, from any thread."""


class Check(Protocol):
    """What reads a file back and proves it."""

    def __call__(self, name: str, on_bytes: OnBytes, until: Until | None = None, /) -> str:
        """The sha256 of the file `name`. It tells `on_bytes` of each number of bytes done, and raises what that raises.

        - `until`: of a file that is still being written: called before bytes are read, with the offset where they end
        """
        ...


@dataclass(frozen=True, eq=False)
class Output:
    """A checkpoint to be written: the files of the plan of `sources`, in `folder`.

    - `done`: files that stand in `folder` already and are not written again
    - `check`: proves each file
    - `hashed`: read every file back for its sha256 where nothing checks it; otherwise such a file has none
    - `on_finished`: called when a file is on disk and checked
    """

    sources: Sources
    folder: Path
    done: Mapping[str, Finished] = field(default_factory=dict)
    check: Check | None = None
    hashed: bool = False
    on_finished: Callable[[Finished], None] | None = None
    finished: dict[str, Finished] = field(default_factory=dict)

    def finish(self, name: str, sha256: str, kept: Mapping[str, Kept], *, proven: bool) -> None:
        """Note that the file `name` is on disk."""
        state = state_of(self.folder / name, error=CheckpointError)
        self.finished[name] = Finished(name, sha256, proven, {tensor: each.numbers for tensor, each in kept.items()}, state)
        if self.on_finished is not None:
            self.on_finished(self.finished[name])


@dataclass(frozen=True, eq=False)
class OpenFile:
    """A file that is being written, and what was kept of each tensor merged so far."""

    output: Output
    shard: PlannedShard
    writer: ShardWriter
    kept: dict[str, Kept] = field(default_factory=dict)

"""Proving a checkpoint while it is being written: each block of a file as soon as it and all before it are there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..checkpoints.checkpoint import Shard
from ..checkpoints.open import open_checkpoint
from ..files.atomic.journal import Finished
from ..files.safetensors.header import read_header
from ..files.safetensors.reader import Until
from ..kernel.stats import Kept
from ..planning.plan import PlannedShard
from .proof import Proof, ShardProof, TensorProof
from .prove import conclude, prove_shard
from .sources import Sources
from .threads import Buffers


class Proofs:
    """The proofs of the files in `folder`, gathered while they are written.

    - `out`: what errors call the folder
    - `done`: files of an earlier run, found to have the bytes that it left; where it proved them, its word is taken
    - `seconds`: what proving took, from the first byte of a file to its last
    """

    def __init__(
        self,
        sources: Sources,
        folder: Path,
        out: str,
        done: Mapping[str, Finished],
        *,
        threads: int | None = None,
    ) -> None:
        self.seconds = 0.0
        self._sources = sources
        self._folder = folder
        self._out = out
        self._threads = threads
        self._buffers = Buffers()
        planned = {shard.name: shard for shard in sources.plan.shards}
        self._shards = {name: _proven_before(entry, planned[name], folder) for name, entry in done.items() if entry.proven}

    def check(self, name: str, on_bytes: Callable[[int], None] | None = None, until: Until | None = None) -> str:
        """The sha256 of the file `name`, as it was read and proven.

        - `on_bytes`: told of each number of bytes
        - `until`: of a file that has its head and its size, and is still being written: waits for the bytes that are read next

        Raises `VerificationError` where it does not hold what it must, and what `until` raises.
        """
        started = time.monotonic()
        shard = Shard(name, read_header(self._folder / name))
        found = prove_shard(shard, self._sources, buffers=self._buffers, threads=self._threads, on_bytes=on_bytes, until=until)
        found.raise_for_failures(self._out)
        self._shards[name] = found
        self.seconds += time.monotonic() - started
        return found.sha256

    def conclude(self) -> Proof:
        """The proof of the whole folder.

        Raises `VerificationError` where something does not hold.
        """
        started = time.monotonic()
        output = open_checkpoint(self._folder)
        proof = conclude(output, self._sources, [self._shards[shard.name] for shard in output.shards])
        proof = replace(proof, out=self._out)
        self.seconds += time.monotonic() - started
        proof.raise_for_failures()
        return proof


def _proven_before(entry: Finished, planned: PlannedShard, folder: Path) -> ShardProof:
    header = read_header(folder / entry.name)
    return ShardProof(
        name=entry.name,
        tensors={step.tensor: TensorProof(step.action, True) for step in planned.steps},
        sha256=entry.sha256,
        nbytes=header.file_size - header.data_start,
        kept={tensor: Kept.of(pair) for tensor, pair in entry.kept.items()},
    )

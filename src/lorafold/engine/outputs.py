"""One merged checkpoint, from the moment when its hidden folder is there to its proof."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Shard
from ..checkpoints.open import open_checkpoint
from ..checkpoints.open_gguf import read_gguf_shard
from ..errors import CheckpointError
from ..files.atomic.folder import StagedFolder
from ..files.atomic.journal import Finished, journal_finished
from ..files.digests import Algorithm, hash_of
from ..files.regular import state_of
from ..files.safetensors.header import read_header
from ..files.safetensors.reader import Until
from ..kernel.stats import Kept
from ..planning.output_files import OUT_GGUF, nbytes
from ..planning.plan import MergePlan, PlannedShard
from .proof import Proof, ShardProof, TensorProof
from .prove import conclude, prove_shard
from .sources import Sources
from .threads import Buffers
from .unchanged_files import UnchangedFiles
from .undofile.session import Undoing

OnBytes = Callable[[int], None]
"""Called with each number of bytes done, from any thread."""


@dataclass(frozen=True, eq=False)
class Output:
    """A checkpoint that is written.

    - `sources`: its plan, and what that reads from; `out`: where it appears, as its caller has it
    - `staged`: the folder that it is written in; `undoing`: the undo file of it, if there is one
    - `fields`: all that decides it, for its journal
    - `earlier`: by name, the files that an earlier run left whole in the folder; `unchanged`: those that are the base's own
    - `notes`: what was found, in words
    - `verify`: whether every file is read back and proven, by so many `threads`; `algorithm`: of the files' hashes
    - `kept`: by tensor, what was kept of its update; `finished`: by name, the files that are on disk and, with `verify`, proven
    - `proofs`: by name, those of the files that were proven by this run; `seconds`: what each took
    """

    sources: Sources
    out: Path
    staged: StagedFolder
    undoing: Undoing
    fields: Mapping[str, Any]
    earlier: Mapping[str, Finished]
    unchanged: UnchangedFiles
    notes: tuple[str, ...] = ()
    verify: bool = True
    algorithm: Algorithm = "sha256"
    threads: int | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)
    proofs: dict[str, ShardProof] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    buffers: Buffers = field(default_factory=Buffers)

    @property
    def plan(self) -> MergePlan:
        """What is done."""
        return self.sources.plan

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.staged.path

    @property
    def place(self) -> Path:
        """The checkpoint in it: the folder, or of an output in GGUF its one file."""
        return self.folder if self.sources.checkpoint.gguf is None else self.folder / OUT_GGUF

    @property
    def standing(self) -> Mapping[str, Finished]:
        """By name, the files in the folder that need not be written."""
        return {**self.unchanged.files, **self.earlier}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return _nbytes(self.plan.shards)

    @property
    def left(self) -> int:
        """Bytes of tensors that are still to be written when it begins."""
        return _nbytes(shard for shard in self.plan.shards if shard.name not in self.standing)

    @property
    def unproven(self) -> int:
        """Bytes of tensors that are still to be proven when it begins."""
        proven = {name for name, entry in self.standing.items() if entry.proven}
        return _nbytes(shard for shard in self.plan.shards if shard.name not in proven) if self.verify else 0

    def take_over(self, on_bytes: OnBytes) -> None:
        """Count the files that stand there already as finished; prove or hash those where that is wanted and was not done."""
        for name in (shard.name for shard in self.plan.shards if shard.name in self.standing):
            entry = self.standing[name]
            if self.verify and not entry.proven:
                self.finish(name, self.prove(name, on_bytes), proven=True)
            elif self.undoing.wanted and not entry.digest:
                self.finish(name, self.hash(name), proven=False)
            else:
                self.finished[name] = entry

    def finish(self, name: str, digest: str, *, proven: bool) -> None:
        """Note, here and in the journal, that the file `name` is on disk."""
        if name in self.standing:
            kept = {tensor: Kept.of(numbers).numbers for tensor, numbers in self.standing[name].kept.items()}
        else:
            own = {step.tensor for shard in self.plan.shards if shard.name == name for step in shard.steps}
            kept = {tensor: each.numbers for tensor, each in self.kept.copy().items() if tensor in own}
        state = state_of(self.folder / name, error=CheckpointError)
        self.finished[name] = Finished(name, digest, proven, kept, state)
        journal_finished(self.folder, self.finished[name])

    def hash(self, name: str) -> str:
        """The hash of the file `name` where something needs it and nothing else reads the file back; otherwise empty."""
        return hash_of(self.folder / name, self.algorithm, error=CheckpointError) if self.undoing.wanted else ""

    def prove(self, name: str, on_bytes: OnBytes | None = None, until: Until | None = None) -> str:
        """The hash of the file `name`, as it was read and proven.

        - `on_bytes`: told of each number of bytes
        - `until`: of a file that has its header and its size, and is still being written: waits for the bytes that are read next

        Raises `VerificationError` where it does not hold what it must, and what `on_bytes` and `until` raise.
        """
        started = time.monotonic()
        read = read_header if self.sources.checkpoint.gguf is None else read_gguf_shard
        shard = Shard(name, read(self.folder / name))
        found = prove_shard(
            shard, self.sources, self.algorithm, buffers=self.buffers, threads=self.threads, on_bytes=on_bytes, until=until
        )
        found.raise_for_failures(str(self.out))
        self.proofs[name] = found
        self.seconds.append(time.monotonic() - started)
        return found.digest

    def conclude(self) -> Proof:
        """The proof of the whole folder. Where an earlier run proved a file that has still its bytes, its word is taken.

        Raises `VerificationError` where something does not hold.
        """
        started = time.monotonic()
        output, planned = open_checkpoint(self.place), {shard.name: shard for shard in self.plan.shards}
        proofs = [
            self.proofs[name] if name in self.proofs else _proven_before(self.finished[name], planned[name], self.folder)
            for name in (shard.name for shard in output.shards)
        ]
        proof = replace(conclude(output, self.sources, proofs), out=str(self.out))
        self.seconds.append(time.monotonic() - started)
        proof.raise_for_failures()
        return proof


def _nbytes(shards: Iterable[PlannedShard]) -> int:
    return sum(nbytes(step) for shard in shards for step in shard.steps)


def _proven_before(entry: Finished, planned: PlannedShard, folder: Path) -> ShardProof:
    header = (read_gguf_shard if entry.name == OUT_GGUF else read_header)(folder / entry.name)
    return ShardProof(
        name=entry.name,
        tensors={step.tensor: TensorProof(step.action, True) for step in planned.steps},
        digest=entry.digest,
        nbytes=header.file_size - header.data_start,
        kept={tensor: Kept.of(pair) for tensor, pair in entry.kept.items()},
    )

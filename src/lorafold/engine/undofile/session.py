"""The undo file of one merge, from the first check to the moment when it and the merged checkpoint are both in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.open import open_checkpoint
from ...checkpoints.receipt import RECEIPT_NAME, Receipt
from ...errors import CheckpointError, LorafoldError, OutputError, VerificationError, printable
from ...files import strictjson
from ...files.atomic.checks import require_space
from ...files.atomic.file import StagedFile
from ...files.atomic.folder import StagedFolder
from ...files.progress import Progress
from ...files.regular import sha256_of
from ...files.safetensors.buffers import bytes_of
from ...planning.output_files import OUT_GGUF
from ..sources import Sources
from ..threads import Workers, workers
from .base_heads import head_from
from .changed import Span, changed_tensors, is_replaced, read_tile
from .read import Place, UndoFile, is_undo_file, opened
from .write_undo import UndoneMerge, write_undo


class Undoing:
    """Writes the undo file `path` of the merge that is written into `staged`; nothing where `path` is None. A context manager.

    - `fields`: all that decides the merge. An undo file of the very same merge, left by a run that was killed before its output
      was in place, is replaced; another one only where the output may be overwritten too

    Entering raises `OutputError` where the file cannot be written there. Leaving before the output is in place takes it away.
    """

    def __init__(self, path: str | os.PathLike[str] | None, staged: StagedFolder, fields: Mapping[str, Any]) -> None:
        self._staged = staged
        self._plan = plan_of(fields)
        self._file = None if path is None else StagedFile(Path(path), inputs=staged.inputs, replaces=self._replaces)
        self._stack = ExitStack()

    @property
    def wanted(self) -> bool:
        """Whether there is a file to write."""
        return self._file is not None

    def __enter__(self) -> Self:
        if self._file is not None:
            out, file = self._staged.out, self._file.out
            if file == out or file.is_relative_to(out):
                raise OutputError(
                    f"{printable(str(file))} cannot be the undo file: it is or lies in the output {printable(str(out))}",
                    hint="choose a place beside it",
                )
            self._stack.enter_context(self._file)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None and self._staged.committed:
            self._file.keep()
        self._stack.__exit__(exc_type, exc, tb)

    def write(self, sources: Sources, receipt: Receipt, *, verify: bool, threads: int | None, progress: Progress) -> int:
        """Write the file for the finished output, and with `verify` prove that it gives the base; its bytes.

        Raises `VerificationError` where it does not, `OutputError` where it cannot be written.
        """
        if self._file is None:
            return 0
        folder = self._staged.path
        output = open_checkpoint(folder if sources.checkpoint.gguf is None else folder / OUT_GGUF)
        threads = None if threads is None else max(1, threads // 2)  # numbers that cancel take twice the memory
        steps = changed_tensors(sources.plan, sources.checkpoint)
        stored = sources.checkpoint.stored
        sizes = {name: stored[name].nbytes for name in steps}
        least = sum(size if is_replaced(steps[name]) else size // 50 for name, size in sizes.items())
        require_space(self._file.out, least)
        total = sum(sizes.values())
        with progress.phase("undo", total * 2 if verify else total) as advance:
            sha256 = sha256_of(folder / RECEIPT_NAME, error=CheckpointError)
            merge = UndoneMerge(output, sha256, self._plan, receipt.files, receipt.beside)
            nbytes = write_undo(self._file, sources, merge, threads=threads, on_bytes=advance)
            if verify:
                with UndoFile(self._file.path) as undo:
                    failures = undo_failures(undo, sources.checkpoint, output, threads=threads, on_bytes=advance)
                if failures:
                    raise VerificationError(
                        f"{printable(str(self._file.out))} does not give back the base",
                        failures=failures,
                        hint="nothing was written; run it again",
                    )
        return nbytes

    def commit(self) -> None:
        """Put the undo file in its place, then the output in its own; if that fails, the file is taken back on leaving.

        Raises `OutputError` where the system refuses.
        """
        if self._file is not None:
            self._file.place()
        self._staged.commit()

    def _replaces(self, path: Path) -> bool:
        return is_undo_file(path, None if self._staged.overwrite else self._plan)


def plan_of(fields: Mapping[str, Any]) -> str:
    """What an undo file calls the merge that `fields` decides."""
    return hashlib.sha256(strictjson.canonical(dict(fields)).encode()).hexdigest()


def undo_failures(
    undo: UndoFile,
    checkpoint: Checkpoint,
    output: Checkpoint,
    *,
    threads: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[str]:
    """Where `undo`, applied to `output`, does not give `checkpoint`, in words; empty where it gives it bit for bit."""
    failures = []
    for shard in checkpoint.shards:
        if head_from(undo.head(shard.name), shard.path).sha256 != shard.header.sha256:
            failures.append(f"the header of {printable(shard.name)} is not that of the base")
    with opened(checkpoint) as base, opened(output) as merged, workers(threads) as pool:
        for name in undo.description.tensors:
            try:
                same = _same(undo, base[name], merged.get(name), pool, on_bytes)
            except LorafoldError as error:
                failures.append(error.message)
                continue
            if not same:
                failures.append(f"'{printable(name)}' does not come out as the base has it")
    return failures


def _same(undo: UndoFile, base: Place, merged: Place | None, pool: Workers, on_bytes: Callable[[int], None] | None) -> bool:
    """Whether one tensor comes out as it must."""
    tensor = undo.tensor(base[1])

    def work(span: Span) -> tuple[bool, int]:
        wanted = read_tile(base[0], tensor.base, span, tensor.columns)
        needed = merged if tensor.needs_merged(span) else None
        found = tensor.restore(span, None if needed is None else read_tile(*needed, span, tensor.columns))
        return bytes_of(found) == bytes_of(wanted), wanted.nbytes

    whole = True
    for same, nbytes in pool.results(work, tensor.spans):
        whole = whole and same
        if on_bytes is not None:
            on_bytes(nbytes)
    return whole

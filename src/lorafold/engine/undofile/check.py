"""An undo file read back and proven: every changed tensor decoded, and compared with the base's bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from ...checkpoints.checkpoint import Checkpoint
from ...errors import LorafoldError, printable
from ...files.safetensors.buffers import bytes_of
from ..threads import Workers, workers
from .changed import Span, read_tile
from .read import Place, UndoFile, opened


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
        if hashlib.sha256(undo.head(shard.name)).hexdigest() != shard.header.sha256:
            failures.append(f"the head of {printable(shard.name)} is not that of the base")
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

"""The first bytes of each file of an output, and where its tensors lie: writing and proving both start from here.

In GGUF the receipt is one of the pairs. It is known when all else is written, so room is left for it, which is blank until then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.receipt import receipt_text
from ..errors import OutputError, printable
from ..files.atomic.checks import output_fault
from ..files.gguf.gguf_header import RECEIPT_KEY, blank_of, read_gguf_header
from ..files.gguf.gguf_layout import gguf_layout, text_pair
from ..files.safetensors.info import TensorInfo
from ..kernel.stats import Kept
from ..planning.gguf_files import gguf_pairs, gguf_specs
from ..planning.output_files import head_of
from ..planning.plan import MergePlan, PlannedShard
from .make_receipt import make_receipt


class FileHead(NamedTuple):
    """The bytes of a file before its tensors; these, in the order of their bytes; and the size of the file."""

    raw: bytes
    tensors: Sequence[TensorInfo]
    file_size: int


def file_head(shard: PlannedShard, plan: MergePlan, checkpoint: Checkpoint, path: Path = Path()) -> FileHead:
    """The beginning of the file `shard` of `plan`, as if it were at `path`; the text of a receipt in it is blank."""
    if checkpoint.gguf is None:
        raw, infos = head_of(shard, plan, checkpoint, path)
        return FileHead(raw, infos, infos[-1].stop if infos else len(raw))
    base = checkpoint.gguf
    pairs = [*gguf_pairs(plan, checkpoint), text_pair(RECEIPT_KEY, " " * _room(shard, plan, checkpoint))]
    specs = gguf_specs(shard, checkpoint)
    layout = gguf_layout(pairs, specs, path, alignment=base.alignment, version=base.version)
    infos = tuple(replace(info, dtype=step.dtype, shape=step.shape) for info, step in zip(layout.tensors, shard.steps, strict=True))
    return FileHead(layout.head, infos, layout.file_size)


def _room(shard: PlannedShard, plan: MergePlan, checkpoint: Checkpoint) -> int:
    """Bytes that the receipt of `plan` takes at most: as many as with the longest numbers and hashes."""
    kept = {step.tensor: Kept(-2.2250738585072014e-308, 1.0, 10**18) for step in shard.steps}
    longest = make_receipt(plan, checkpoint, kept, {shard.name: f"blake3:{'0' * 64}"})
    tensors = {step.tensor: "0" * 64 for step in shard.steps}
    return len(receipt_text(replace(longest, tensor_hashes=tensors)).encode()) + _SLACK


_SLACK = 256
"""For the sums, whose numbers are longer than those that they are made of."""


def put_receipt(path: Path, text: str) -> None:
    """Write `text` into the room for it in the file at `path`, which is on the disk when this returns.

    Raises `OutputError` where it does not fit, or cannot be written.
    """
    raw, blank = text.encode(), blank_of(read_gguf_header(path))
    if len(raw) > blank[1] - blank[0]:
        raise OutputError(f"{printable(str(path))} has room for {blank[1] - blank[0]} bytes of its receipt, which takes {len(raw)}")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(raw):
                done += os.pwrite(fd, raw[done:], blank[0] + done)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as cause:
        raise output_fault(cause, path) from cause

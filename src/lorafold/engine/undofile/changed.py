"""Which base tensors a merge changes, and in what tiles they are worked on. Writing, proving and restoring all start from here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ...errors import PlanError, printable
from ...files.safetensors.buffers import tensor_over
from ...files.safetensors.info import TORCH_DTYPES, TensorInfo
from ...files.safetensors.reader import TensorFile
from ...kernel.undo.compact import tile_rows
from ...kernel.update import LowRankUpdate
from ...planning.plan import MergePlan, Step
from ..blocks import matrix_shape
from ..sources import Sources
from .format import ChangedPiece, ChangedTensor


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of a changed tensor, all of piece number `piece`: tile number `number`."""

    number: int
    piece: int
    start: int
    stop: int


_Updates = tuple[int, int, tuple[LowRankUpdate, ...]]


def changed_tensors(plan: MergePlan, checkpoint: Checkpoint) -> dict[str, Step | None]:
    """By name, the tensors that the base stores and the output does not have as they are, and the step that changes each.

    The step is None of one of which the base's tensors are made, but which is none itself: its bytes are kept. New tensors need no
    undoing.

    Raises `PlanError` where the output does not have every tensor of the base under its own name.
    """
    check_undoable(plan, checkpoint)
    stored, copied = checkpoint.stored, {step.tensor for step in plan.steps if step.action == "copy"}
    as_it_is = {name for name, info in stored.items() if checkpoint.as_stored.get(name) == info}
    if checkpoint.encoded:
        codes = {step.tensor for step in plan.steps if step.action == "encode"}
        as_it_is = {name for name in as_it_is if name in copied or name in codes or checkpoint.tensors.get(name) == stored[name]}
    found: dict[str, Step | None] = {s.tensor: s for s in plan.steps if s.action != "copy" and s.tensor in as_it_is}
    return found | dict.fromkeys(name for name in stored if name not in as_it_is)


def check_undoable(plan: MergePlan, checkpoint: Checkpoint) -> None:
    """Raises `PlanError` where the output of `plan` will not have every tensor of the base in its shape and under its name."""
    dense = next((step.tensor for step in plan.steps if step.groups > 1), None)
    if dense is not None:
        raise PlanError(
            f"{printable(dense)} is written as a dense convolution, of another shape than the base's: that cannot be undone",
            hint="nothing was written; merge without an undo file, and keep the base",
        )
    origins = {step.tensor: step.source for step in plan.steps}
    for name in checkpoint.tensors:
        if name in checkpoint.encoded:
            continue  # its own tensors are kept where the output has others
        if origins.get(name) != name:
            raise PlanError(
                f"{printable(name)} of the base is not in the output under this name, since the adapter is for a model of other"
                " layers (layer_replication): that cannot be undone",
                hint="nothing was written; merge without an undo file, and keep the base",
            )


def described(step: Step | None, info: TensorInfo, pieces: tuple[ChangedPiece, ...], columns: int) -> ChangedTensor:
    """How the base tensor `info`, from `legible`, is cut for the undo of `step`; its hash is not known yet."""
    dtype = TORCH_DTYPES[info.dtype]
    rows = math.prod(info.shape) // columns if columns else 0
    whole = (ChangedPiece(0, rows, ()),)
    return ChangedTensor("0" * 64, columns, tile_rows(columns, dtype), pieces or whole, step is not None and bool(step.rows))


def is_replaced(step: Step | None) -> bool:
    """Whether the merged tensor says nothing of the base's numbers."""
    return step is None or step.replacement is not None or (step.coded is not None and step.action != "encode")


def legible(info: TensorInfo) -> TensorInfo:
    """`info`, or its bytes as numbers where torch has no such type."""
    return info if info.torch_dtype is not None else replace(info, dtype="U8", shape=(info.nbytes,))


def spans(tensor: ChangedTensor) -> Iterator[Span]:
    """The tiles of a tensor, in order."""
    number = 0
    for i, piece in enumerate(tensor.pieces):
        for start in range(piece.start, piece.stop, tensor.tile):
            yield Span(number, i, start, min(start + tensor.tile, piece.stop))
            number += 1


def tile_count(tensor: ChangedTensor) -> int:
    """How many tiles `spans` gives."""
    return sum(-(-(piece.stop - piece.start) // tensor.tile) for piece in tensor.pieces)


def read_tile(file: TensorFile, info: TensorInfo, span: Span, columns: int) -> Tensor:
    """(rows, columns) of a tile, from the tensor `info` of `file`, in memory of its own."""
    dtype = TORCH_DTYPES[info.dtype]
    row = columns * dtype.itemsize
    buffer = bytearray((span.stop - span.start) * row)
    file.read_into(info.start + span.start * row, memoryview(buffer))
    return tensor_over(buffer, dtype, (span.stop - span.start, columns))


def updates_of(step: Step | None, info: TensorInfo, sources: Sources) -> tuple[list[_Updates], int]:
    """The pieces (start, stop, updates) of the tensor `info`, and its columns; none where what was added does not help.

    DoRA's weight is no sum, nor one of which something was taken out: such tensors are set against the merged numbers themselves.
    """
    if step is None or step.coded is not None:
        return [], math.prod(info.shape[1:])
    columns = matrix_shape(step)[1]
    if is_replaced(step) or any(addend.dora is not None or addend.residual or addend.transform for addend in step.addends):
        return [], columns
    return [(piece.start, piece.stop, piece.updates) for piece in sources.change(step).pieces], columns

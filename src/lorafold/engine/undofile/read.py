"""Reading an undo file: what it says, held against itself, and a tile of the base at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from ...checkpoints.checkpoint import Checkpoint
from ...errors import CheckpointError, LorafoldError, UpdateError, VerificationError, printable
from ...files.safetensors.header import read_header
from ...files.safetensors.info import TORCH_DTYPES, TensorInfo
from ...files.safetensors.reader import TensorFile
from ...kernel.update import LowRankUpdate
from . import format as name_of
from .changed import Span, legible, spans, tile_count
from .format import FIELD, FIELD_SHA256, ChangedTensor, Description, description_from
from .tiles import BITS, NOTHING, WHOLE, EncodedTile, decode, is_number, narrowed, put_back, tile_bytes

Place = tuple[TensorFile, TensorInfo]
"""An open file and where in it a tensor lies."""


@contextmanager
def opened(checkpoint: Checkpoint) -> Iterator[dict[str, Place]]:
    """By name, the open file and the place of each tensor."""
    with ExitStack() as stack:
        found: dict[str, Place] = {}
        for shard in checkpoint.shards:
            file = stack.enter_context(TensorFile(shard.header))
            found |= {name: (file, info) for name, info in shard.header.tensors.items()}
        yield found


_LARGEST_TILE = 1 << 28


class UndoFile:
    """The undo file at `path`, open for reading; a context manager. `description`: what it is of.

    Raises `CheckpointError` where there is no file, `VerificationError` where it is none or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shown = printable(str(path))
        if not path.is_file():
            raise CheckpointError(f"{self.shown}: no such file")
        try:
            self._header = read_header(path)
        except CheckpointError as error:
            raise VerificationError(f"{error.message}: the undo file is damaged", hint=error.hint) from error
        text = self._header.metadata.get(FIELD)
        if text is None:
            raise VerificationError(
                f"{self.shown} is not an undo file: its metadata has no {FIELD}", hint="give the file of the merge with `undo=FILE`"
            )
        if hashlib.sha256(text.encode()).hexdigest() != self._header.metadata.get(FIELD_SHA256):
            raise VerificationError(f"{self.shown} is damaged: its description does not have the hash that it was written with")
        try:
            self.description: Description = description_from(text, self.shown)
        except CheckpointError as error:
            raise VerificationError(f"{error.message}: the undo file is damaged") from error
        except LorafoldError as error:
            raise error if isinstance(error, VerificationError) else VerificationError(error.message) from error
        self._file = TensorFile(self._header)

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.__exit__(exc_type, exc, tb)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._header.file_size

    def head(self, shard: str) -> bytes:
        """The first bytes of the base's file `shard`, up to its tensors."""
        info = self._info(name_of.head(shard), "U8")
        return bytes(self._bytes(info, 0, info.nbytes))

    def stored(self, name: str) -> Iterator[bytes]:
        """The bytes of the file `name` beside the base's weights, a part at a time."""
        info = self._info(name_of.file(name), "U8")
        for offset in range(0, info.nbytes, 1 << 20):
            yield bytes(self._bytes(info, offset, min(1 << 20, info.nbytes - offset)))

    def tensor(self, base: TensorInfo) -> TensorUndo:
        """What restores the changed tensor `base`, as the base's header has it.

        Raises `VerificationError` where the file does not fit it.
        """
        base = legible(base)
        name, tensor = base.name, self.description.tensors[base.name]
        rows = tensor.pieces[-1].stop if tensor.pieces else 0
        dtype = TORCH_DTYPES.get(base.dtype)
        if dtype is None or rows * tensor.columns != base.numel:
            raise self.damaged(
                f"'{printable(name)}' is {list(base.shape)} of {printable(base.dtype)}, not {rows} × {tensor.columns}"
            )
        if min(tensor.tile, max(1, rows)) * tensor.columns * dtype.itemsize > _LARGEST_TILE and tensor.tile > 1:
            raise self.damaged(f"a tile of '{printable(name)}' has {tensor.tile} rows")
        table = self._info(name_of.table(name), "I64", (tile_count(tensor), 3))
        counts = self._file.read(table)
        if not is_number(dtype) and bool(((counts[:, 0] != WHOLE) & (counts[:, 0] != BITS)).any()):
            raise self.damaged(f"'{printable(name)}' is of {printable(base.dtype)}, of which nothing is restored by subtracting")
        sizes, payload, total = [], self._info(name_of.payload(name), "U8"), 0
        for span, (near, far, size) in zip(spans(tensor), counts.tolist(), strict=True):
            most = tile_bytes(near, far, (span.stop - span.start) * tensor.columns, dtype)
            if not (size == most if near in (NOTHING, WHOLE) else 0 <= size <= most) or (total := total + size) > payload.nbytes:
                raise self.damaged(f"the table of '{printable(name)}' says what cannot be")
            sizes.append(size)
        if total != payload.nbytes:
            raise self.damaged(f"'{printable(name)}' has {payload.nbytes} bytes of differences, expected {total}")
        updates = [self._updates(name, tensor, i) for i in range(len(tensor.pieces))]
        held = None
        if tensor.rows:
            indices = self._info(name_of.row_indices(name), "I64")
            values = self._info(name_of.row_values(name), base.dtype, (indices.numel, tensor.columns))
            held = self._file.read(indices).flatten(), self._file.read(values)
        return TensorUndo(self, base, tensor, counts, _starts(payload.start, sizes), updates, held)

    def damaged(self, what: str) -> VerificationError:
        """The error to raise where the file contradicts itself."""
        return VerificationError(f"{self.shown} is damaged: {what}", hint="nothing was written; use `base=BASE` if you have it")

    def read(self, start: int, nbytes: int) -> bytearray:
        """`nbytes` bytes of the file from byte `start` on."""
        buffer = bytearray(nbytes)
        self._file.read_into(start, memoryview(buffer))
        return buffer

    def _updates(self, name: str, tensor: ChangedTensor, piece: int) -> list[LowRankUpdate]:
        start, stop = tensor.pieces[piece].start, tensor.pieces[piece].stop
        found = []
        for i, scaling in enumerate(tensor.pieces[piece].scalings):
            A, B = (self._file.read(self._info(name_of.factor(kind, piece, i, name))) for kind in ("lora_A", "lora_B"))
            try:
                update = LowRankUpdate(A, B, float(scaling))
            except UpdateError as error:
                raise self.damaged(f"the factors of '{printable(name)}': {error.message}") from None
            if update.shape != (stop - start, tensor.columns):
                raise self.damaged(f"the factors of '{printable(name)}' make {list(update.shape)}")
            found.append(update)
        return found

    def _info(self, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> TensorInfo:
        info = self._header.tensors.get(name)
        if info is None:
            raise self.damaged(f"it has no '{printable(name)}'")
        if dtype not in (None, info.dtype) or shape not in (None, info.shape) or info.torch_dtype is None:
            raise self.damaged(f"'{printable(name)}' is {list(info.shape)} of {printable(info.dtype)}")
        return info

    def _bytes(self, info: TensorInfo, offset: int, nbytes: int) -> bytearray:
        return self.read(info.start + offset, nbytes)


@dataclass(frozen=True, eq=False)
class TensorUndo:
    """What an undo file has of one tensor, with its table and factors in memory; made by `UndoFile.tensor`.

    - `file`, `base`, `tensor`: the undo file, the tensor as the base has it, and how it is cut
    - `counts`: its table; `starts`: from which byte of the file each tile is
    - `updates`: of each piece; `rows`: (indices, values) of the rows that were replaced
    """

    file: UndoFile
    base: TensorInfo
    tensor: ChangedTensor
    counts: Tensor
    starts: list[int]
    updates: list[list[LowRankUpdate]]
    rows: tuple[Tensor, Tensor] | None

    @property
    def columns(self) -> int:
        """It is seen as a matrix of so many."""
        return self.tensor.columns

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Its tiles, in order."""
        return tuple(spans(self.tensor))

    def needs_merged(self, span: Span) -> bool:
        """Whether the merged numbers say something of those of the base."""
        return int(self.counts[span.number, 0]) != WHOLE

    def restore(self, span: Span, merged: Tensor | None) -> Tensor:
        """(rows, columns) of the base, from the same rows of the merged tensor, which are used up."""
        near, far, nbytes = (int(count) for count in self.counts[span.number])
        shape = (span.stop - span.start, self.columns)
        data = self.file.read(self.starts[span.number], nbytes)
        updates = self.updates[span.piece]
        if merged is not None and self.rows is not None:
            put_back(merged, self.rows, span)
        if near != WHOLE and merged is None:
            raise self.file.damaged(f"'{printable(self.base.name)}' cannot be restored without its merged numbers")
        try:
            tile = EncodedTile(near, far, data)
            added = narrowed(updates, span, self.tensor.pieces[span.piece].start)
            return decode(tile, merged, added, shape, TORCH_DTYPES[self.base.dtype])
        except (RuntimeError, IndexError, ValueError) as cause:  # not the differences that the table says
            raise self.file.damaged(f"'{printable(self.base.name)}' cannot be unpacked: {str(cause).splitlines()[0]}") from cause


def _starts(first: int, sizes: list[int]) -> list[int]:
    starts, at = [], first
    for size in sizes:
        starts.append(at)
        at += size
    return starts


def is_undo_file(path: Path, plan: str | None = None) -> bool:
    """Whether there is an undo file at `path`; with `plan`, one of that merge."""
    try:
        found = UndoFile(path).description
    except LorafoldError:
        return False
    return plan is None or found.plan == plan

"""What a plan reads from: the base's tensors, as expressions of those that are stored, and the adapters'."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, AdapterModule
from ..adapters.numbers import AdapterReader
from ..adapters.transform import Transform
from ..checkpoints.checkpoint import BaseReader, Checkpoint
from ..checkpoints.encodings.again import encoded_again
from ..errors import PlanError, printable
from ..files.evaluation import evaluate, rows_of
from ..files.expression import Diagonal, Matrix, Reshaped, Zeros, narrow
from ..files.safetensors.buffers import tensor_over
from ..files.safetensors.info import TensorInfo
from ..files.safetensors.reader import TensorFile
from ..kernel.cpu.rescaling import add_squares_between
from ..kernel.cpu.stream import FileRows
from ..kernel.numerics import subnormal_numbers
from ..kernel.rescale import add_column_squares
from ..kernel.rounding import Stochastic
from ..kernel.stages import Rescale, Stage
from ..kernel.stats import Kept
from ..kernel.update import LowRankUpdate
from ..kernel.wide import column_lengths
from ..planning.make import fingerprint
from ..planning.plan import Addend, MergePlan, Step
from .blocks import Block, blocks_of, matrix_shape
from .change import Change, NewValues, cut
from .residual import DECOMPOSED, nbytes_needed, taken_out
from .threads import Buffers, Room
from .transformed import transformed


class BaseTensors(Protocol):
    """What the numbers of a base are read from: its files, or a model in memory."""

    def __enter__(self) -> Self:
        """Open it."""
        ...

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        """Close it."""
        ...

    def file(self, info: TensorInfo) -> TensorFile | None:
        """The open file that the tensor `info` lies in; None where it is in none."""
        ...

    def read(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        """The stored tensor `info`, or slices of one, in new memory or over the first bytes of `buffer`."""
        ...


class Sources:
    """A base checkpoint and adapters, open for reading; a context manager.

    - `base`: what the base's tensors are read from, by default its files

    Entering raises `PlanError` where they are not those that `plan` was made for; leaving raises `CheckpointError` where a file
    changed meanwhile.
    """

    def __init__(
        self, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter], base: BaseTensors | None = None
    ) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.adapters = tuple(adapters)
        self._base: BaseTensors = BaseReader(checkpoint) if base is None else base
        self._stack = ExitStack()
        self._readers: list[AdapterReader] = []
        self._decomposing = Room(DECOMPOSED)

    def __enter__(self) -> Self:
        if fingerprint(self.checkpoint) != self.plan.fingerprint:
            raise PlanError(f"the plan was made for another base: {self.plan.base} has changed", hint="make the plan anew")
        for planned, adapter in zip(self.plan.adapters, self.adapters, strict=True):
            if planned.sha256 != adapter.sha256:
                raise PlanError(f"the plan was made for another adapter: {planned.path} has changed", hint="make the plan anew")
        with ExitStack() as stack:
            stack.enter_context(self._base)
            self._readers = [stack.enter_context(AdapterReader(adapter)) for adapter in self.adapters]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def origin(self, step: Step) -> Matrix:
        """What `step` starts from, in the step's shape: the base tensor, or the adapter's that replaces it.

        The rows of a convolution in groups stand where the inputs of their group are, among zeros.
        """
        if step.replacement is not None:
            return self.adapters[step.adapter or 0].header.tensors[step.replacement]
        if step.source is None:
            return Zeros(step.shape)
        if step.action == "copy":
            return self.checkpoint.as_stored[str(step.source)]
        matrix = self.checkpoint.tensors[str(step.source)]
        if step.action == "encode":
            return self.checkpoint.encoded[str(step.source)].natural
        if step.groups == 1:
            return matrix
        rows, groups = matrix.shape[0], step.groups
        flat = Reshaped(matrix, (rows, matrix.numel // max(1, rows)))
        ends = [group * rows // groups for group in range(groups + 1)]
        return Reshaped(Diagonal(tuple(narrow(flat, 0, low, high - low) for low, high in pairwise(ends))), step.shape)

    def stored(self, step: Step) -> tuple[TensorFile, TensorInfo] | None:
        """The open file and the place where what `step` starts from lies in the base as it is; None where `start` must make it."""
        origin = None if step.replacement is not None else self.origin(step)
        file = self.file(origin) if isinstance(origin, TensorInfo) else None
        return None if file is None or not isinstance(origin, TensorInfo) else (file, origin)

    def file(self, info: TensorInfo) -> TensorFile | None:
        """The open file of the base that its tensor `info` lies in; None where it is in none."""
        return self._base.file(info)

    def start(self, block: Block, buffers: Buffers) -> tuple[Tensor, bytearray]:
        """The rows that `block` starts from, (count, columns) as the block has them, and the buffer they lie in."""
        rows = rows_of(self.origin(block.step), block.start, block.count, block.columns)
        buffer = buffers.take(rows.nbytes)
        if isinstance(rows, TensorInfo):
            return self._read(rows, buffer=buffer), buffer
        found = evaluate(rows, self._read)
        return tensor_over(buffer, found.dtype, rows.shape).copy_(found), buffer

    def codes(self, block: Block, base: Tensor, sums: Tensor) -> tuple[Tensor, Kept]:
        """The codes for `sums`, (bytes,) uint8, and how much of what was added to `base` they keep; both (count, columns) float64.

        `block`: of a step that encodes, and rows as its numbers have them.
        """
        step, options = block.step, self.plan.options
        encoded = self.checkpoint.encoded[str(step.source)]
        rows = rows_of(encoded.natural, block.start, block.count, block.columns)
        noise = Stochastic(options.seed, step.tensor, block.offset) if options.code_rounding == "stochastic" else None
        codes, numbers = encoded_again(encoded, rows, sums, self._read, None if noise is None else noise.uniform(block.numel))
        added, moved = (sums - base).reshape(-1), (numbers.reshape(base.shape) - base).reshape(-1)
        if options.allow_nonfinite_base:
            added, moved = added.nan_to_num_(0.0, 0.0, 0.0), moved.nan_to_num_(0.0, 0.0, 0.0)
        return codes, Kept(float(torch.dot(moved, added)), float(torch.dot(added, added)))

    def rows(self, block: Block) -> FileRows | None:
        """Where in an open file the rows lie that `block` starts from, as it has them; None where `start` must make them."""
        stored = self.stored(block.step)
        if stored is None or (dtype := stored[1].torch_dtype) is None:
            return None
        file, info = stored
        return FileRows(file.fileno(), info.start + block.offset * dtype.itemsize, dtype, block.columns)

    def replacement(self, step: Step) -> Tensor:
        """The adapter's tensor that `step` puts in."""
        return self._readers[step.adapter or 0].tensor(self.adapters[step.adapter or 0].header.tensors[str(step.replacement)])

    def _read(self, info: TensorInfo, *, buffer: bytearray | None = None) -> Tensor:
        reader = next((reader for reader in self._readers if reader.adapter.header.path == info.path), None)
        return self._base.read(info, buffer=buffer) if reader is None else reader.tensor(info, buffer=buffer)

    def change(self, step: Step) -> Change:
        """What is done to the tensor that `step` starts from, seen as a matrix as it is stored; a bias is a column."""
        with subnormal_numbers():
            return self._change(step)

    def _change(self, step: Step) -> Change:
        placed: list[tuple[int, LowRankUpdate]] = []
        stages: list[Stage] = []
        first = self._taken_out(step)
        held: dict[tuple[int, TensorInfo], Tensor] = {}  # of experts, whose factors are cut out of the same tensors

        def read(adapter: int, info: TensorInfo) -> Tensor:
            if (adapter, info) not in held:
                held[adapter, info] = self._readers[adapter].tensor(info)
            return held[adapter, info]

        for addend in step.addends:
            reader = self._readers[addend.adapter]
            module = reader.adapter.modules[addend.module]
            if module.transform is not None:
                return Change(
                    cut(matrix_shape(step)[0], ()), whole=self._transformed(step, module.transform, reader, addend.scaling)
                )
            if addend.part == "weight":
                update = reader.update(module, partial(read, addend.adapter) if len(step.addends) > 1 else None)
            else:
                update = reader.bias_update(module)
            update = replace(update, scaling=addend.scaling)
            if addend.section is not None:
                update = update.narrow(0, addend.section[0], addend.section[1] - addend.section[0])
            update = update.T if addend.transposed else update
            placed.append((0 if addend.rows is None else addend.rows[0], update))
            rescale = None if addend.dora is None else self._rescale(step, addend, reader, module, update, first)
            stages.append(Stage(update, rescale, addend.rows))
        ordered = tuple(stages) if any(stage.rescale is not None for stage in stages) else ()
        return Change(cut(matrix_shape(step)[0], placed), ordered, self._rows(step, placed), first)

    def _taken_out(self, step: Step) -> LowRankUpdate | None:
        """What an adapter took out of the base tensor of `step` before it was trained, to be added first."""
        addend = next((addend for addend in step.addends if addend.residual is not None), None)
        residual = None if addend is None else self.adapters[addend.adapter].modules[addend.module].residual
        if residual is None or step.replacement is not None:  # PEFT saved what was left, as it does of embeddings and heads
            return None
        initial = self.adapters[addend.adapter].initial if addend is not None else None
        if residual.kind == "given" and initial is not None and addend is not None:
            with AdapterReader(initial) as reader:
                before = reader.update(initial.modules[addend.module]).scaled(-1.0)
            return before.T if addend.transposed else before
        rows, columns = matrix_shape(step)
        with self._decomposing.taking(nbytes_needed(rows, columns, residual.r)):
            return taken_out(self._whole(step), residual, printable(str(step.source)))

    def _transformed(self, step: Step, transform: Transform, reader: AdapterReader, strength: float) -> Tensor:
        """The new matrix of `step`, (rows, columns) float64."""
        rows, columns = matrix_shape(step)
        with self._decomposing.taking(4 * 8 * rows * columns):  # W, what becomes of it, and what is between
            return transformed(self._whole(step), transform, reader.tensor, strength)

    def _whole(self, step: Step) -> Tensor:
        """What `step` starts from, (rows, columns) float64."""
        buffers = Buffers()
        weight = torch.empty(matrix_shape(step), dtype=torch.float64, device="cpu")
        for block in blocks_of(step):
            rows, taken = self.start(block, buffers)
            weight[block.start : block.start + block.count] = rows
            buffers.give(taken)
        return weight

    def _rescale(
        self,
        step: Step,
        addend: Addend,
        reader: AdapterReader,
        module: AdapterModule,
        update: LowRankUpdate,
        first: LowRankUpdate | None,
    ) -> Rescale:
        """DoRA's, with the lengths of columns where what has a magnitude of its own is a column, or several: an input's kernel."""
        magnitude, strength = reader.magnitude(module), float(addend.dora or 0.0)
        if addend.section is not None:  # of the outputs that land here
            magnitude = magnitude[slice(*addend.section)]
        if (module.embedding or addend.transposed) == (module.magnitude_axis == 1):
            return Rescale(magnitude, strength, None, module.rule)
        squares = self._column_squares(step, Change((), first=first), Stage(update))
        each = squares.numel() // magnitude.numel()
        lengths = column_lengths(squares, each)
        return Rescale(magnitude.repeat_interleave(each), strength, lengths, module.rule)

    def _rows(self, step: Step, placed: Sequence[tuple[int, LowRankUpdate]]) -> NewValues | None:
        if not step.rows:
            return None
        indices = torch.tensor([index for new in step.rows for index in new.indices], dtype=torch.int64, device="cpu")
        readers = [(self._readers[new.adapter], new.values) for new in step.rows]
        values = [reader.tensor(reader.adapter.header.tensors[name]).double() for reader, name in readers]
        updates = tuple(replace(update, lora_B=update.lora_B[indices]) for _, update in placed)  # of the whole tensor
        return NewValues(indices, torch.cat(values), updates)

    def _column_squares(self, step: Step, change: Change, stage: Stage) -> Tensor:
        """(columns,) float64: the squares of W + ΔW, added up in each column, W as it is where `change` begins."""
        squares = torch.zeros(matrix_shape(step)[1], dtype=torch.float64, device="cpu")
        buffers = Buffers()
        for block in blocks_of(step):
            rows = self.rows(block) if change.first is None else None
            done = 0 if rows is None else add_squares_between(squares, rows, block.count, stage, block.start)
            if done < block.count:
                rest = block.after(done)
                base, taken = self.start(rest, buffers)
                add_column_squares(squares, change.begin(base, rest.start), stage, rest.start)
                buffers.give(taken)
        return squares

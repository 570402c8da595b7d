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
from ..arithmetic import subnormal_numbers
from ..checkpoints.checkpoint import BaseReader, Checkpoint
from ..checkpoints.encodings.again import beyond_codes, encoded_again
from ..checkpoints.encodings.by_compiled_code import code_rule, coded_rows
from ..checkpoints.encodings.encoded import Encoded
from ..checkpoints.encodings.on_the_fly import with_its_mean
from ..errors import CheckpointError, PlanError, printable
from ..files.evaluation import evaluate, rows_of
from ..files.expression import Diagonal, Matrix, Permuted, Reshaped, Zeros, narrow
from ..files.safetensors.buffers import tensor_over
from ..files.safetensors.info import TORCH_DTYPES, TensorInfo
from ..files.safetensors.reader import TensorFile
from ..kernel.cpu.codes import CodedRows
from ..kernel.cpu.recoding import CodeRule
from ..kernel.cpu.rescaling import add_squares_between
from ..kernel.cpu.stream import FileRows
from ..kernel.rescale import add_column_squares
from ..kernel.rotate import RotatedWeight, rotate_weight
from ..kernel.rotations import RowRotation
from ..kernel.rounding import Stochastic, noise_of
from ..kernel.stages import Rescale, Stage
from ..kernel.stats import Kept
from ..kernel.update import LowRankUpdate
from ..kernel.wide import column_lengths
from ..planning.make import fingerprint
from ..planning.plan import Addend, MergePlan, Step
from ..planning.quantised_training import as_planned
from .blocks import Block, blocks_of, matrix_shape, rounding_of
from .change import Change, NewValues, cut
from .elementproducts import elementwise_of
from .residual import DECOMPOSED, nbytes_needed, taken_out
from .threads import Buffers, Once, Room
from .transformed import rotation_of, transforming_stages

MADE_OF = 0.8
"""The share of codes that must be those nearest to an original's numbers, where its sums are rounded to nearest. Of a base that was
quantised so it is nearly 1, in whatever type; codes that were chosen by calibration are near 2/3, those of another model 1/10."""


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
        self.checkpoint = as_planned(plan, checkpoint)
        self.adapters = tuple(adapters)
        self._base: BaseTensors = BaseReader(checkpoint) if base is None else base
        self._stack = ExitStack()
        self._readers: list[AdapterReader] = []
        self._decomposing = Room(DECOMPOSED)
        of_floats = {name: each.decoded for name, each in self.checkpoint.encoded.items() if each.of_floats}
        self._loaded = {name: Once(partial(with_its_mean, matrix, self._read)) for name, matrix in of_floats.items()}

    def __enter__(self) -> Self:
        if fingerprint(self.checkpoint) != self.plan.fingerprint:
            raise PlanError(f"the plan was made for another base: {self.plan.base} has changed", hint="make the plan anew")
        original = self.checkpoint.original
        if (None if original is None else fingerprint(original)) != (self.plan.original and self.plan.original.fingerprint):
            raise PlanError("the plan was made for another original, of which codes are made", hint="make the plan anew")
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
            encoded, original = self.checkpoint.encoded[str(step.source)], self.checkpoint.original
            if original is None:
                return encoded.natural
            found = original.tensors[str(step.source)]
            return Permuted(found, encoded.decoded.dims) if isinstance(encoded.decoded, Permuted) else found
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
        origin = self.origin(block.step)
        if block.step.replacement is None and block.step.source in self._loaded:
            origin = self._loaded[block.step.source]()
        rows = rows_of(origin, block.start, block.count, block.columns)
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
        noise = self.noise(block, block.start)
        base = base.double()
        if self.checkpoint.original is not None and not block.start:
            self._check_made_of(block, encoded, rows, base)
        codes, numbers = encoded_again(encoded, rows, sums, self._read, None if noise is None else noise.uniform(block.numel))
        added, moved = (sums - base).reshape(-1), (numbers.reshape(base.shape) - base).reshape(-1)
        if options.allow_nonfinite_base:
            added, moved = added.nan_to_num_(0.0, 0.0, 0.0), moved.nan_to_num_(0.0, 0.0, 0.0)
        lost = beyond_codes(rows, sums, self._read)
        return codes, Kept(float(torch.dot(moved, added)), float(torch.dot(added, added)), lost)

    def _check_made_of(self, block: Block, encoded: Encoded, rows: Matrix, numbers: Tensor) -> None:
        """Raises `CheckpointError` where the codes of the base are not those nearest to `numbers` of its original."""
        _, nearest = encoded_again(encoded, rows, numbers.double(), self._read, None)
        share = float((nearest.reshape(-1) == evaluate(rows, self._read).double().reshape(-1)).double().mean())
        if share < MADE_OF:
            raise CheckpointError(
                f"tensor '{printable(block.step.tensor)}' ({printable(encoded.encoding)}) was not made of the original by rounding"
                f" to nearest: {share:.0%} of the codes looked at are those of its numbers, expected {MADE_OF:.0%} or more",
                hint="nothing was written; it is another model, or its codes were chosen by calibration (GPTQ, AWQ), which rounding"
                " undoes: leave out `requantise_from=ORIGINAL`",
            )

    def rows(self, block: Block) -> FileRows | CodedRows | None:
        """Where in an open file the rows lie that `block` starts from, as it has them; None where `start` must make them."""
        if block.step.coded is not None:
            return self._coded_rows(block)
        stored = self.stored(block.step)
        if stored is None or (dtype := stored[1].torch_dtype) is None:
            return None
        file, info = stored
        return FileRows(file.fileno(), info.start + block.offset * dtype.itemsize, dtype, block.columns)

    def _coded_rows(self, block: Block) -> CodedRows | None:
        origin = self.origin(block.step)
        found = coded_rows(rows_of(origin, block.start, block.count, block.columns), block.count, block.columns, self._read)
        file = None if found is None else self.file(found[0])
        return None if found is None or file is None else CodedRows(file.fileno(), found[0].start, found[1])

    def rule(self, block: Block) -> CodeRule | None:
        """Which codes the sums of `block` get, where its step encodes; None of other steps, and where it takes torch."""
        if block.step.action != "encode" or self.checkpoint.original is not None:
            return None
        encoded = self.checkpoint.encoded[str(block.step.source)]
        return code_rule(encoded, rows_of(encoded.natural, block.start, block.count, block.columns), self._read)

    def noise(self, block: Block, row: int) -> Stochastic | None:
        """What decides which code a sum of `block` gets, from row `row` of the tensor on; None: the nearer one."""
        options = self.plan.options
        if options.code_rounding != "stochastic":
            return None
        return Stochastic(options.seed, block.step.tensor, row * block.columns)

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
        elements = elementwise_of(step, self._readers)
        if elements is not None:
            return Change(cut(matrix_shape(step)[0], ()), elements=elements)
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
                shape, pieces = matrix_shape(step), cut(matrix_shape(step)[0], ())
                rotation = rotation_of(shape[0], module.transform, reader.tensor, addend.scaling)
                if rotation is not None:
                    return Change(pieces, rotation=rotation, whole=Once(partial(self._rotated, step, rotation)))
                return Change(pieces, transforming_stages(shape, module.transform, reader.tensor, addend.scaling))
            if addend.part == "weight":
                update = reader.update(module, partial(read, addend.adapter) if len(step.addends) > 1 else None)
            else:
                update = reader.bias_update(module)
            update = replace(update, scaling=addend.scaling)
            if addend.section is not None:
                update = update.narrow(0, addend.section[0], addend.section[1] - addend.section[0])
            if addend.columns is not None:
                update = _among(update, *addend.columns)
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

    def _rotated(self, step: Step, rotation: RowRotation) -> RotatedWeight:
        """The new matrix of `step`, in its dtype; of one that is encoded then, float64."""
        rows, columns = matrix_shape(step)
        dtype = torch.float64 if step.action == "encode" else TORCH_DTYPES[step.dtype]
        with self._decomposing.taking(16 * rows * columns), subnormal_numbers():
            noise = noise_of(rounding_of(0, Block(step, 0, rows, columns), self.plan.options), dtype)
            return rotate_weight(self._whole(step, None), rotation, dtype, noise)

    def _whole(self, step: Step, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """What `step` starts from, (rows, columns), in `dtype`; None: as it is."""
        buffers = Buffers()
        weight = torch.empty(0, dtype=dtype or torch.float64, device="cpu")
        for block in blocks_of(step):
            rows, taken = self.start(block, buffers)
            if block.start == 0:
                weight = torch.empty(matrix_shape(step), dtype=dtype or rows.dtype, device="cpu")
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
            done = 0 if not isinstance(rows, FileRows) else add_squares_between(squares, rows, block.count, stage, block.start)
            if done < block.count:
                rest = block.after(done)
                base, taken = self.start(rest, buffers)
                add_column_squares(squares, change.begin(base, rest.start), stage, rest.start)
                buffers.give(taken)
        return squares


def _among(update: LowRankUpdate, start: int, stop: int, count: int) -> LowRankUpdate:
    """`update` of the rows `start` to `stop` of a matrix of `count` rows, for all of them: zero elsewhere."""
    return replace(update, lora_B=torch.nn.functional.pad(update.lora_B, (0, 0, start, count - stop)))

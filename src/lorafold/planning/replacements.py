"""Whether a base tensor can be merged into, and whether a tensor of an adapter, or rows of it, can take the place of it.

A copy of the base's own tensor says nothing: PEFT saves an embedding whole when LoRA is put on it. It must not count as a
replacement, which could not be weighted or met by a second adapter.
"""

from __future__ import annotations

import torch

from ..adapters.adapter import Adapter, TrainedRows
from ..adapters.numbers import AdapterReader
from ..checkpoints.checkpoint import BaseReader, Checkpoint
from ..checkpoints.encodings.gguf_blocks import LAYOUTS
from ..checkpoints.quantised import method_beside, quantisation_of
from ..errors import CheckpointError, InputError, ShapeMismatchError, UnsupportedAdapterError, printable
from ..files.expression import Matrix
from ..files.safetensors.info import BITS, TORCH_DTYPES, TensorInfo
from .names.offers import Slot

MERGEABLE = ("BF16", "F16", "F32", "F64")
"""The types that an update can be added to, as safetensors names them."""


def check_mergeable(info: Matrix, name: str, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` where nothing can be added to the base tensor `name`, or it stands for other numbers."""
    place = printable(str(checkpoint.file_of(info)))
    if info.dtype in MERGEABLE:
        if name.endswith(".weight") and (method := method_beside(name.removesuffix(".weight"), checkpoint)) is not None:
            raise _quantised(f"{place}: tensor '{printable(name)}'", method)
        return
    if checkpoint.gguf is not None and info.dtype not in BITS:
        raise CheckpointError(
            f"{place}: tensor '{printable(name)}' is of ggml's type {printable(info.dtype)}, which is not decoded: expected"
            f" {', '.join((*MERGEABLE[:3], *LAYOUTS))}",
            hint="nothing was written; llama.cpp's llama-quantize makes a base of these types of the model's F16 file",
        )
    raise quantised(checkpoint, f"{place}: tensor '{printable(name)}'") or CheckpointError(
        f"{place}: tensor '{printable(name)}' is of type {printable(info.dtype)}, expected one of {', '.join(MERGEABLE)}",
        hint="an update can only be added to floating-point numbers",
    )


def quantised(checkpoint: Checkpoint, what: str | None = None) -> CheckpointError | None:
    """The error to raise where an update is meant for quantised numbers; None where nothing says that the base is quantised."""
    method = quantisation_of(checkpoint)
    return None if method is None else _quantised(what or printable(str(checkpoint.root)), method)


def _quantised(what: str, method: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is quantised ({printable(method)}), expected {', '.join(MERGEABLE)}",
        hint="an update cannot be added to numbers that are not decoded; merge into the unquantised base, then quantise the result;"
        " transformers' model.dequantize() makes one where it is lost",
    )


_BLOCK = 1 << 22
"""Elements compared at once."""


def is_copy(adapter: Adapter, info: TensorInfo, checkpoint: Checkpoint, base: Matrix) -> bool:
    """Whether the tensor `info` of `adapter` was saved unasked and has, rounded to its dtype, the numbers of `base`.

    PEFT does that with an embedding or a head that LoRA is put on, and with both of a model whose vocabulary was resized.

    Of a model in memory none is taken for a copy: to put in the numbers that are there changes nothing.
    """
    unasked = ".base_layer." in info.name or info.name in adapter.unasked
    if checkpoint.live or not unasked or info.shape != base.shape or base.dtype not in TORCH_DTYPES:
        return False
    rows, dtype = info.shape[0], TORCH_DTYPES[base.dtype]
    step = max(1, _BLOCK * rows // max(1, info.numel))
    with AdapterReader(adapter) as reader, BaseReader(checkpoint) as held:
        return all(
            torch.equal(
                (found := reader.rows(info, start, count := min(step, rows - start)).to(dtype)),
                held.rows(base, start, count).view_as(found),
            )
            for start in range(0, rows, step)
        )


def whole_tensor(name: str, slots: tuple[Slot, ...], adapter: Adapter) -> str:
    """The one base tensor that is all of what the adapter names `name`.

    Raises `UnsupportedAdapterError` where the base stores it in parts, or with others.
    """
    if len(slots) == 1 and slots[0].whole:
        return slots[0].tensor
    raise UnsupportedAdapterError(
        f"{printable(adapter.name)} puts a whole tensor in the place of {printable(name)}, which this base stores"
        f" {'with others' if len(slots) == 1 else 'in parts'}: {', '.join(printable(slot.tensor) for slot in slots)}",
        hint="nothing was written; merge into a checkpoint that stores it as one tensor",
    )


def check_replacement(info: TensorInfo, base: Matrix, name: str, adapter: Adapter, *, resizable: bool) -> None:
    """A replacement has the base's shape; an embedding or a head (`resizable`) may have another number of rows.

    Raises `ShapeMismatchError`, and `InputError` for a type that cannot replace the base's.
    """
    fits = info.shape[1:] == base.shape[1:] and len(info.shape) == len(base.shape) if resizable else info.shape == base.shape
    if not fits:
        raise ShapeMismatchError(
            f"{printable(str(adapter.path))}: '{printable(info.name)}' replaces {printable(name)}, expected {list(base.shape)},"
            f" found {list(info.shape)}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if info.torch_dtype is None or (info.dtype != base.dtype and base.dtype not in MERGEABLE):
        raise InputError(f"'{printable(info.name)}' of type {printable(info.dtype)} cannot replace {printable(base.dtype)}")


def check_rows(trained: TrainedRows, base: Matrix, name: str, adapter: Adapter) -> None:
    """Trained rows are as long as the base's, and the base has the rows that they replace.

    Raises `ShapeMismatchError`, and `InputError` for types that are not floating-point.
    """
    values, shape = trained.values, list(base.shape)
    if len(base.shape) != 2 or base.shape[1] != values.shape[1] or max(trained.indices, default=0) >= base.shape[0]:
        raise ShapeMismatchError(
            f"{printable(str(adapter.path))}: '{printable(values.name)}' {list(values.shape)} holds rows up to"
            f" {max(trained.indices, default=0)} of {printable(name)}, which is {shape}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if base.dtype not in MERGEABLE or values.dtype not in MERGEABLE:
        raise InputError(
            f"'{printable(values.name)}' of type {printable(values.dtype)} cannot replace rows of {printable(base.dtype)}"
        )

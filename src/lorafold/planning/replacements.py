"""Whether a tensor of an adapter, or rows of it, can take the place of the base's."""

from __future__ import annotations

from ..adapters.adapter import Adapter, TrainedRows
from ..errors import InputError, ShapeMismatchError, UnsupportedAdapterError, printable
from ..files.safetensors.info import TensorInfo
from .families import EMBEDDINGS, HEADS
from .mergeable import MERGEABLE
from .names.offers import Slot


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


def check_replacement(info: TensorInfo, base: TensorInfo, name: str, adapter: Adapter) -> None:
    """A replacement has the base's shape; an embedding or a head may have another number of rows, for another vocabulary.

    Raises `ShapeMismatchError`, and `InputError` for a type that cannot replace the base's.
    """
    resizable = name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS + HEADS
    fits = info.shape[1:] == base.shape[1:] and len(info.shape) == len(base.shape) if resizable else info.shape == base.shape
    if not fits:
        raise ShapeMismatchError(
            f"{printable(str(adapter.path))}: '{printable(info.name)}' replaces {printable(name)}, expected {list(base.shape)},"
            f" found {list(info.shape)}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if info.torch_dtype is None or (info.dtype != base.dtype and base.dtype not in MERGEABLE):
        raise InputError(f"'{printable(info.name)}' of type {printable(info.dtype)} cannot replace {printable(base.dtype)}")


def check_rows(trained: TrainedRows, base: TensorInfo, name: str, adapter: Adapter) -> None:
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

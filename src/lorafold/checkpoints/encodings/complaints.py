"""What is said where the stored tensors of a weight do not fit each other, and how those beside it are looked up."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import CheckpointError, printable
from ...files.safetensors.info import TensorInfo
from .encoded import Stored

FLOATS = ("F32", "BF16", "F16")
"""The types that scales have."""


def unfit(info: TensorInfo, expected: str, found: object) -> CheckpointError:
    """The error for a stored tensor that is not what its weight needs."""
    return CheckpointError(
        f"{printable(str(info.path))}: tensor '{printable(info.name)}': expected {expected}, found {printable(str(found))}",
        hint="weights, scales and configuration are of different checkpoints, or damaged: copy or download them again",
    )


def partner(stored: Stored, codes: TensorInfo, name: str) -> TensorInfo:
    """The tensor `name`, without which `codes` cannot be decoded. Raises `CheckpointError` where it is missing."""
    if name not in stored:
        raise CheckpointError(
            f"{printable(str(codes.path))}: tensor '{printable(name)}' is missing, without which '{printable(codes.name)}'"
            " cannot be decoded",
            hint="shards are missing, or of another checkpoint: copy or download them again",
        )
    return stored[name]


def require(info: TensorInfo, dtypes: Sequence[str], *shapes: tuple[int, ...]) -> TensorInfo:
    """`info`, where it has one of `dtypes` and one of `shapes` (any, where none is given). Raises `CheckpointError` otherwise."""
    if info.dtype not in dtypes:
        raise unfit(info, f"elements of type {' or '.join(dtypes)}", info.dtype)
    if shapes and info.shape not in shapes:
        raise unfit(info, f"shape {' or '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}", list(info.shape))
    return info

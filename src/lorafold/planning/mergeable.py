"""Whether anything can be added to a tensor of the base: only to floating-point numbers, not to quantised ones."""

from __future__ import annotations

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.quantised import method_beside, quantisation_of
from ..errors import CheckpointError, printable
from ..files.safetensors.info import TensorInfo

MERGEABLE = ("BF16", "F16", "F32", "F64")
"""The types that an update can be added to, as safetensors names them."""


def check_mergeable(info: TensorInfo, name: str, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` where nothing can be added to the base tensor `name`, or it stands for other numbers."""
    if info.dtype in MERGEABLE:
        if name.endswith(".weight") and (method := method_beside(name.removesuffix(".weight"), checkpoint)) is not None:
            raise _quantised(f"{printable(str(info.path))}: tensor '{printable(name)}'", method)
        return
    raise quantised(checkpoint, f"{printable(str(info.path))}: tensor '{printable(name)}'") or CheckpointError(
        f"{printable(str(info.path))}: tensor '{printable(name)}' is of type {printable(info.dtype)},"
        f" expected one of {', '.join(MERGEABLE)}",
        hint="an update can only be added to floating-point numbers",
    )


def quantised(checkpoint: Checkpoint, what: str | None = None) -> CheckpointError | None:
    """The error to raise where an update is meant for quantised numbers; None where nothing says that the base is quantised."""
    method = quantisation_of(checkpoint)
    return None if method is None else _quantised(what or printable(str(checkpoint.root)), method)


def _quantised(what: str, method: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is quantised ({printable(method)}), expected {', '.join(MERGEABLE)}",
        hint="an update cannot be added to quantised numbers; merge into the unquantised base, then quantise the result;"
        " transformers' model.dequantize() makes one where it is lost",
    )

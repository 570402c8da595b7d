"""Whether anything can be added to a tensor of the base: only to floating-point numbers, not to quantised ones."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, printable
from ..tensorfile import TensorInfo

MERGEABLE = ("BF16", "F16", "F32", "F64")
"""The types that an update can be added to, as safetensors names them."""


def check_mergeable(info: TensorInfo, name: str, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` where nothing can be added to the base tensor `name`."""
    if info.dtype in MERGEABLE:
        return
    raise quantised(checkpoint, f"{printable(str(info.path))}: tensor '{printable(name)}'") or CheckpointError(
        f"{printable(str(info.path))}: tensor '{printable(name)}' is of type {printable(info.dtype)},"
        f" expected one of {', '.join(MERGEABLE)}",
        hint="an update can only be added to floating-point numbers",
    )


def quantised(checkpoint: Checkpoint, what: str | None = None) -> CheckpointError | None:
    """The error to raise where an update is meant for quantised numbers; None where the base does not say that it is quantised."""
    quantization = (checkpoint.config or {}).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method = printable(str(quantization.get("quant_method", "of unknown kind")))
    return CheckpointError(
        f"{what or printable(str(checkpoint.root))} is quantised ({method}), expected {', '.join(MERGEABLE)}",
        hint="an update cannot be added to quantised numbers; merge into the unquantised base, then quantise the result",
    )

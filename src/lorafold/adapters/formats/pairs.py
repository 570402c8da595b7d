"""What readers of single pairs have in common: A and B of a module found, checked, and made an `AdapterModule`."""

from __future__ import annotations

from ...errors import AdapterError, printable
from ...files.safetensors.info import Header, TensorInfo
from ..expression import Matrix, Permuted
from .single_file import Parts, check_floats, check_shape


def both(name: str, parts: Parts, first: str, second: str, header: Header) -> tuple[TensorInfo, TensorInfo, str]:
    """The two factors of the module `name`, and how errors begin that are about it.

    Raises `AdapterError` where one is missing, or a part is not of floating-point numbers.
    """
    shown = f"{printable(str(header.path))}: {printable(name)}"
    for have, lack in ((first, second), (second, first)):
        if lack not in parts:
            raise AdapterError(
                f"{shown} has {', '.join(sorted(parts))} but no {lack}"
                if have not in parts
                else f"{shown} has {have} but no {lack}",
                hint="the file is not complete; nothing was written",
            )
    check_floats(parts, shown)
    return parts[first], parts[second], shown


def straight(A: TensorInfo, B: TensorInfo, shown: str) -> int:
    """The rank of A (r, in) and B (out, r).

    Raises `AdapterError` where they are not that.
    """
    fits = len(A.shape) == len(B.shape) == 2 and A.shape[0] == B.shape[1] > 0
    check_shape(B, f"(out, r) beside '{printable(A.name)}' (r, in) {list(A.shape)}", fits, shown)
    return A.shape[0]


def turned(A: TensorInfo, B: TensorInfo, shown: str) -> tuple[Matrix, Matrix, int]:
    """lora_A (r, in), lora_B (out, r) and the rank of A (in, r) and B (r, out).

    Raises `AdapterError` where they are not that.
    """
    fits = len(A.shape) == len(B.shape) == 2 and A.shape[1] == B.shape[0] > 0
    check_shape(B, f"(r, out) beside '{printable(A.name)}' (in, r) {list(A.shape)}", fits, shown)
    return Permuted(A), Permuted(B), A.shape[1]


def magnitude(parts: Parts, part: str, outputs: int, shown: str) -> TensorInfo | None:
    """DoRA's magnitude in `part`, one number for each of `outputs`; None where there is none.

    Raises `AdapterError` where it has another shape.
    """
    info = parts.get(part)
    if info is not None:
        check_shape(info, f"({outputs},), a number for each output", info.shape == (outputs,), shown)
    return info

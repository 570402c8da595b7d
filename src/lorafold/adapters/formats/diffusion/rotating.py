"""Kinds of LyCORIS that make a new weight of the one that is there: OFT, BOFT, GLoRA and IA³, their tensors checked.

The alpha of OFT and BOFT is no factor but how far a rotation may go, 0 being as far as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....errors import AdapterError, printable
from ....files.safetensors.info import Header
from ....files.safetensors.reader import TensorFile
from ...adapter import Scaling
from ...transform import Transform
from ..single_file import Parts, check_shape


def transform_of(parts: Parts, scaling: Scaling, alpha: float, on_input: bool, shown: str) -> Transform | None:
    """What `parts` make of a weight; None where they are a sum.

    - `alpha`: as it is stored, or 0; `on_input`: whether IA³ is of the inputs

    Raises `AdapterError` where their shapes do not go together.
    """
    if "oft_blocks" in parts:
        blocks = parts["oft_blocks"]
        fits = len(blocks.shape) in (3, 4) and blocks.shape[-1] == blocks.shape[-2] and 0 not in blocks.shape
        check_shape(blocks, "(blocks, size, size), or (stages, blocks, size, size)", fits, shown)
        if not alpha >= 0:
            raise AdapterError(f"{shown}: its alpha is {alpha:g}, expected the limit of a rotation, 0 or more")
        held = {name: parts[name] for name in ("oft_blocks", "rescale") if name in parts}
        return Transform("OFT" if len(blocks.shape) == 3 else "BOFT", held, alpha)
    if "ia3" in parts:
        return Transform("IA³", {"ia3": parts["ia3"]}, 1.0, on_input)
    if "a1" in parts:
        held = {name: parts[name] for name in ("a1", "a2", "b1", "b2")}
        for name, info in held.items():
            plain = len(info.shape) >= 2 and all(size == 1 for size in info.shape[2:])
            check_shape(info, f"{name} of two dimensions, or of a 1 × 1 kernel", plain, shown)
        return Transform("GLoRA", held, scaling.value)
    return None


def read_flags(header: Header, modules: Mapping[str, Parts]) -> dict[str, bool]:
    """The flag ``on_input`` of each module that has one.

    Raises `AdapterError` where it is not one number, 0 or 1.
    """
    flags = {}
    with TensorFile(header) as file:
        for module, parts in modules.items():
            info = parts.get("on_input")
            if info is None:
                continue
            shown = f"{printable(str(header.path))}: {printable(module)}"
            check_shape(info, "one number", info.numel == 1 and info.torch_dtype is not None, shown)
            value = float(file.read(info))
            if value not in (0.0, 1.0):
                raise AdapterError(f"{shown}: on_input is {value:g}, expected 0 or 1")
            flags[module] = value == 1.0
    return flags

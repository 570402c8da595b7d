"""The tensors of one file sorted into modules: a name is its module's, a dot, and one of the endings that a format has.

What the parts mean is for the readers of the formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...errors import AdapterError, UnsupportedAdapterError, nearest_names, printable
from ...files.safetensors.info import Header, TensorInfo
from ...files.safetensors.reader import TensorFile

Parts = Mapping[str, TensorInfo]
"""The tensors of one module by the part that each is."""


def split_name(name: str, endings: Collection[str]) -> tuple[str, str] | None:
    """The module and the ending of a tensor's name; None where it has none of `endings`.

    >>> split_name("lora_unet_conv_in.lora_up.weight", ["weight", "lora_up.weight"])
    ('lora_unet_conv_in', 'lora_up.weight')
    """
    found = [ending for ending in endings if name.endswith(f".{ending}") and len(name) > len(ending) + 1]
    longest = max(found, key=len, default=None)
    return None if longest is None else (name[: -len(longest) - 1], longest)


def gather(header: Header, endings: Mapping[str, str], refused: Mapping[str, str]) -> dict[str, dict[str, TensorInfo]]:
    """The parts of each module of the file, every tensor of it in one place.

    - `endings`: what a name ends in, and the part that it then is
    - `refused`: endings of what cannot be merged, and why

    Raises `AdapterError` where a tensor is no such part, or two are the same part; `UnsupportedAdapterError` for `refused`.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        shown = f"{printable(str(header.path))}: tensor '{printable(name)}'"
        found = split_name(name, endings.keys() | refused.keys())
        if found is None:
            last = name.partition(".")[2]
            near = nearest_names(last, endings)
            raise AdapterError(
                f"{shown} is no part of a module that is known",
                hint=f"did you mean …{near[0]}?" if near else "the file holds more than this format has; nothing was written",
            )
        module, ending = found
        if ending in refused:
            raise UnsupportedAdapterError(f"{shown} belongs to {refused[ending]}", hint="nothing was written")
        parts, part = modules.setdefault(module, {}), endings[ending]
        if part in parts:
            raise AdapterError(f"{shown} and '{printable(parts[part].name)}' are the same part of {printable(module)}")
        parts[part] = info
    if not modules:
        raise AdapterError(f"{printable(str(header.path))} holds no tensors")
    return modules


def check_floats(parts: Parts, shown: str) -> None:
    """Raises `AdapterError` where one of `parts` but alpha does not hold floating-point numbers of 16 bits or more."""
    for part, info in parts.items():
        dtype = info.torch_dtype
        if part == "alpha":
            continue  # some trainers write it as an integer
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise AdapterError(
                f"{shown}: '{printable(info.name)}' is of type {printable(info.dtype)}, expected 16 to 64-bit floats"
            )


def check_shape(info: TensorInfo, expected: str, fits: bool, shown: str) -> None:
    """Raises `AdapterError` where the shape of `info` does not fit; `expected` says it in words."""
    if not fits:
        raise AdapterError(f"{shown}: '{printable(info.name)}' must be {expected}, found {list(info.shape)}")


def read_alphas(header: Header, modules: Mapping[str, Parts]) -> dict[str, float]:
    """The number in the part ``alpha`` of each module that has one.

    Raises `AdapterError` where it is not one number.
    """
    alphas = {}
    with TensorFile(header) as file:
        for module, parts in modules.items():
            info = parts.get("alpha")
            if info is not None:
                shown = f"{printable(str(header.path))}: {printable(module)}"
                check_shape(info, "one number", info.numel == 1 and info.torch_dtype is not None, shown)
                alphas[module] = float(file.read(info))
    return alphas


def some(names: Collection[str]) -> str:
    """The first three of `names`, for errors and notes."""
    shown = ", ".join(printable(name) for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def missing_among(modules: Mapping[str, Parts], part: str, among: str) -> tuple[list[str], list[str]]:
    """The modules with the part `among`: those that have `part` too, and those that have not."""
    have = [name for name, parts in modules.items() if among in parts and part in parts]
    lack = [name for name, parts in modules.items() if among in parts and part not in parts]
    return have, lack

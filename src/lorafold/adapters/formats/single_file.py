"""An adapter that is one file of tensors without a configuration: the file found, its tensors sorted into modules, their A and B
paired, and the factor alpha / dim of each. The name of a tensor is that of its module, a dot, and a suffix.

A file in which some modules have an alpha and others have none has lost some, or was put together from two: which strength the
others were trained with cannot be told, so it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

from ...errors import AdapterError, UnsupportedAdapterError, nearest_names, printable
from ...files.expression import Matrix, Permuted
from ...files.safetensors.info import Header, TensorInfo
from ...files.safetensors.reader import TensorFile
from ..adapter import Adapter, AdapterModule, Scaling
from ..source import Source
from .diffusion.names import embeddings_in, embeddings_note, of_component, split_name

_PATTERNS = ("pytorch_lora_weights.safetensors", "*.safetensors")


def tensor_file(source: Source) -> str | None:
    """The name of the one .safetensors file of `source`; None where there is none or several."""
    return source.find(*_PATTERNS)


def open_one(source: Source) -> Header:
    """The header of the one .safetensors file of `source`.

    Raises `AdapterError` where there is none, or several.
    """
    name = tensor_file(source)
    if name is None:
        raise AdapterError(f"{source.shown} holds no .safetensors file, or several", hint="give the path of the file")
    return source.header(name)


def single_file(
    source: Source,
    header: Header,
    modules: Mapping[str, AdapterModule],
    kind: str,
    *,
    notes: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    replacements: Mapping[str, TensorInfo] | None = None,
) -> Adapter:
    """The adapter of format `kind` that is `modules`, or what of them is of the component that the user asked for."""
    left = embeddings_in(header.tensors)
    adapter = Adapter(
        name=source.name,
        path=source.path,
        format=kind,
        modules=modules,
        replacements=replacements or {},
        header=header,
        sha256=source.sha256(header.path.name),
        config=config or {},
        notes=(*notes, *embeddings_note(left)),
        left_out=left,
    )
    return of_component(adapter, source.options.component)


Parts = Mapping[str, TensorInfo]
"""The tensors of one module by the part that each is."""


def gather(header: Header, endings: Mapping[str, str], refused: Mapping[str, str]) -> dict[str, dict[str, TensorInfo]]:
    """The parts of each module of the file, every tensor of it in one place.

    - `endings`: what a name ends in, and the part that it then is
    - `refused`: endings of what cannot be merged, and why

    Raises `AdapterError` where a tensor is no such part, or two are the same part; `UnsupportedAdapterError` for `refused`.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    left = embeddings_in(header.tensors)
    for name, info in header.tensors.items():
        if name in left:
            continue
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
        if part in ("alpha", "on_input"):
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


Alphas: TypeAlias = Mapping[str, tuple[float | None, str]]
"""By module, its alpha, None where it has none, and where it comes from."""


def scaling_of(dim: int, alpha: float | None, source: str = "its own") -> Scaling:
    """alpha / dim; where alpha is 0 or missing it is dim, so that the factor is 1 (kohya-ss/sd-scripts, `networks/lora.py`).

    >>> scaling_of(8, 4.0).why, scaling_of(8, None).value
    ('alpha 4 (its own) / dim 8', 1.0)
    """
    if alpha is None or alpha == 0:
        return Scaling(1.0, dim, float(dim), f"alpha {'missing' if alpha is None else '0'}, so it is dim {dim}: 1")
    return Scaling(alpha / dim, dim, float(alpha), f"alpha {alpha:g} ({source}) / dim {dim}")


def settle_alphas(
    stored: Mapping[str, float], needing: Collection[str], given: float | None, shown: str
) -> tuple[Alphas, tuple[str, ...]]:
    """The alpha of each module of `needing` with where it comes from, and notes.

    - `given`: by the user, for modules that have none

    Raises `AdapterError` where some have one, others not, and none is given; or one is no finite number.
    """
    for name in needing:
        if not math.isfinite(stored.get(name, 0.0)):
            raise AdapterError(f"{shown}: the alpha of {printable(name)} is {stored[name]}, expected a finite number")
    lack = [name for name in needing if name not in stored]
    alphas = {name: (stored[name], "its own") if name in stored else (given, "as given") for name in needing}
    if not lack:
        return alphas, ()
    if given is not None:
        return alphas, (f"{len(lack)} modules have no alpha: {given:g} was given",)
    if len(lack) < len(needing):
        raise AdapterError(
            f"{shown}: {len(lack)} of {len(needing)} modules have no alpha: {some(lack)}",
            hint="tensors were lost, or the file was put together from two; `ReadOptions(lora_alpha=…)` says what it is for these",
        )
    return alphas, ("the file has no alpha: each module's is taken to be its dim, so that the factor is 1",)

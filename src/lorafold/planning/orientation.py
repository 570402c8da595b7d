"""Which way round a weight is stored: (out_features, in_features), or the other way.

Shapes tell where they differ. Where a weight is square it is the model's family, for a stack of experts also the version of PEFT
that trained the adapter, and nothing is guessed where these are not known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from ..adapters.adapter import Adapter, AdapterModule
from ..adapters.formats.diffusion.names import PIPELINE
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.conv1d import CONV1D as CONV1D_OF
from ..checkpoints.conv1d import stored_transposed
from ..errors import AmbiguousNameError, ShapeMismatchError, printable
from ..files.expression import Matrix
from .families import FAMILIES, families_of
from .names.offers import Slot, shape_of
from .names.transformers import known_types

CONV1D = frozenset(name for modules in CONV1D_OF.values() for name in modules)
"""What linear layers are called that transformers stores (in_features, out_features)."""


Way: TypeAlias = tuple[bool, str]
"""Whether a weight is stored (in, out), and why."""


def matrix_orientation(
    tensor: str, fits: tuple[bool, bool], expected: str, adapter: Adapter, checkpoint: Checkpoint, square: Way | None = None
) -> Way:
    """Whether the matrix `tensor` is stored (in, out), and why where that had to be decided: in memory by the class of its module,
    in files by the model's family first, by its shape, by the adapter's word last (`square_ways`).

    - `fits`: whether ΔW does as it is, and transposed; at least one of them
    - `expected`: for an error, the module and the shape of (in, out)
    - `square`: what `square_ways` says of it

    Raises `ShapeMismatchError` where it fits only the other way.
    """
    straight, turned = fits
    where, _, shape = expected.rpartition(" as ")
    known = _known(tensor, checkpoint)
    if known is not None and known[0]:
        if not turned:
            raise ShapeMismatchError(f"{where}: {known[1]} stores {printable(tensor)} as (in, out), expected {shape}")
        return True, ""
    if straight and (known is not None or not turned):
        return False, ""
    if straight:
        return square or (False, "")
    if (adapter.fan_in_fan_out or adapter.given_fan_in_fan_out) and not checkpoint.live:
        return True, "stored (in, out), by its shape and the adapter's fan_in_fan_out"
    if _last(tensor.removesuffix(".weight")) in CONV1D and not checkpoint.live:
        return True, "stored (in, out), by its shape and a name that transformers gives to Conv1D"
    raise ShapeMismatchError(
        f"{where}: ΔW fits {printable(tensor)} only transposed: only the transpose would fit",
        hint="if the model stores this weight as (in, out), set fan_in_fan_out to true in the adapter's configuration",
    )


def _known(tensor: str, checkpoint: Checkpoint) -> tuple[bool, str] | None:
    """Whether `tensor` is stored (in, out), and by whom, where the model's class or its family tells; None where neither does."""
    if checkpoint.transposed is not None:
        return tensor in checkpoint.transposed, "the class of its module"
    family = stored_transposed(tensor, checkpoint.model_types)
    if family is not None:
        return True, family
    return (False, "") if any(name in FAMILIES or name in known_types() for name in checkpoint.model_types) else None


def square_ways(
    adapter: Adapter, slots: Mapping[str, tuple[Slot, ...]], present: Mapping[str, Matrix], checkpoint: Checkpoint
) -> dict[str, Way]:
    """Which way round each square weight is stored that neither class nor family nor shape tells of, by the adapter's module.

    PEFT's fan_in_fan_out is that of the last layer which it wrapped: where the adapter is on linear layers of both kinds it says
    nothing of the others. So it counts where nothing speaks against it: for modules that are called as transformers calls its
    Conv1D, and for others where all are alike.

    Raises `AmbiguousNameError` where nothing tells.
    """
    outputs = _outputs(adapter, slots)  # torch's own, always (out, in)
    squares: dict[str, str] = {}
    told: dict[str, set[bool]] = {}
    for name, module in adapter.modules.items():
        each = slots[name]
        if (
            name in outputs
            or len(module.shape) != 2
            or module.embedding
            or module.index is not None
            or len(each) != 1
            or not each[0].whole
        ):
            continue
        shape, known = present[each[0].tensor].shape, _known(each[0].tensor, checkpoint)
        if known is not None:
            told.setdefault(_last(name), set()).add(known[0])
        elif shape == module.shape == shape[::-1]:
            squares[name] = each[0].tensor
        elif shape in (module.shape, module.shape[::-1]):
            told.setdefault(_last(name), set()).add(shape != module.shape)
    kinds = {*told, *map(_last, squares)}
    return {name: _square(name, tensor, kinds, told, adapter) for name, tensor in squares.items()}


def _square(name: str, tensor: str, kinds: Collection[str], told: Mapping[str, set[bool]], adapter: Adapter) -> Way:
    if adapter.given_fan_in_fan_out is not None:
        return adapter.given_fan_in_fan_out, "a square weight of an unknown model is stored as its user says"
    last, field = _last(name), adapter.fan_in_fan_out
    if len(told.get(last, ())) == 1:
        return next(iter(told[last])), ""
    if adapter.format in PIPELINE:  # linear layers and convolutions, torch's own
        return False, ""
    others = CONV1D.intersection(kinds) - {last}
    if adapter.format != "peft":
        sure = True
    elif field:
        sure = last in CONV1D or not (told or others)
    else:
        sure = last not in CONV1D or any(False in ways for each, ways in told.items() if each in CONV1D)
    if sure:
        word = "(in, out)" if field else "(out, in)"
        return field, f"a square weight of an unknown model is taken to be stored {word}, as fan_in_fan_out says"
    raise AmbiguousNameError(
        f"{printable(adapter.name)}: {printable(name)} is for {printable(tensor)}, a square weight of a model that is not known:"
        f" whether it is stored (out, in) or (in, out) cannot be told, and fan_in_fan_out, which is {str(field).lower()}, is that"
        " of the layer which PEFT wrapped last",
        hint="nothing was written; `ReadOptions(fan_in_fan_out=True)` (transformers' Conv1D) or False (nn.Linear) says it; so does"
        " the model_type in the base's config.json",
    )


def _outputs(adapter: Adapter, slots: Mapping[str, tuple[Slot, ...]]) -> list[str]:
    """The modules of `adapter` that are output projections of a MultiheadAttention."""
    inner = [name for name, each in slots.items() if each and each[0].tensor.endswith(".in_proj_weight")]
    return [f"{name}.out_proj" for name in inner if f"{name}.out_proj" in adapter.modules]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def attention_outputs(adapter: Adapter, slots: Mapping[str, tuple[Slot, ...]], checkpoint: Checkpoint) -> Adapter:
    """`adapter` with the updates of MultiheadAttention's output projections the way round that PEFT trained them.

    PEFT gives that layer the fan_in_fan_out of the layer which it wrapped before: after a Conv1D its update is added transposed.

    Raises `AmbiguousNameError` where that may be so, and was not said.
    """
    outputs = _outputs(adapter, slots)
    stored = [each[0].tensor for each in slots.values() if each]
    mixed = adapter.fan_in_fan_out or any((known := _known(tensor, checkpoint)) is not None and known[0] for tensor in stored)
    for name, each in slots.items():  # or by its shape
        module, info = adapter.modules[name], checkpoint.tensors.get(each[0].tensor) if len(each) == 1 else None
        if info is not None and module.index is None and not module.embedding and len(module.shape) == 2:
            mixed = mixed or info.shape == module.shape[::-1] != module.shape
    if not outputs or not (mixed or adapter.given_fan_in_fan_out):
        return adapter
    if adapter.given_fan_in_fan_out is None:
        raise AmbiguousNameError(
            f"{printable(adapter.name)}: {printable(outputs[0])} is attention's output projection beside layers that are stored"
            " (in, out): PEFT trained it as the layer that it wrapped before, and which that was is not known",
            hint="nothing was written; `ReadOptions(fan_in_fan_out=True)` (after a Conv1D, its update is transposed) or False"
            " says it",
        )
    if not adapter.given_fan_in_fan_out:
        return adapter
    return replace(adapter, modules={n: m.turned() if n in outputs and not m.exchanged else m for n, m in adapter.modules.items()})


def turned_modules(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, bool]:
    """Whether PEFT saw the stacks of a module of experts transposed, by that module's name, where one that is not square tells.

    - `shapes`: of what is stored for the modules of `adapter`, by their names

    All stacks of a module are seen the same way round (PEFT, `tuners/lora/layer.py: ParamWrapper`).
    """
    seen: dict[str, set[bool]] = {}
    for name, module in adapter.modules.items():
        if (
            module.index is not None
            and name in shapes
            and shapes[name] in (module.shape, module.shape[::-1])
            and len(set(module.shape)) == 2
        ):
            seen.setdefault(module.tensor.rpartition(".")[0], set()).add(shapes[name] != module.shape)
    return {around: ways.pop() for around, ways in seen.items() if len(ways) == 1}


def expert_orientation(
    tensor: str,
    straight: bool,
    turned: bool,
    adapter: Adapter,
    config: Mapping[str, Any] | None,
    where: str,
    *,
    parameter: bool,
    others: bool | None,
) -> tuple[bool, str]:
    """Whether the matrices of the stack `tensor` are stored (in, out) as ΔW sees it, and why.

    - `straight`, `turned`: whether ΔW fits as it is, and transposed; at least one of them
    - `parameter`: whether ΔW was trained on the stack itself (PEFT's target_parameters), not on the layer of one expert
    - `others`: which way the other stacks of the same module are seen, where that is known

    Raises `AmbiguousNameError` where both fit and nothing tells.
    """
    if straight != turned:
        return turned, "an expert of a stack" + (", stored (in, out) by its shape" if turned else "")
    if others is not None:
        return others, "an expert of a stack of square weights, seen as the other stacks of the same experts"
    families = [family for family in families_of(config) if family.experts != "out-in"] or families_of(config)[:1]
    if len(families) == 1 and families[0].experts is not None:
        if not (parameter and adapter.format == "peft"):
            return families[0].experts == "in-out", "an expert of a stack, stored as its family does"
        version = _version(adapter.config.get("peft_version"))
        if version is not None:
            # PEFT up to 0.18 saw any stack as (experts, in, out), 0.19.0 all but those marked is_transposed, later ones these
            marked = families[0].is_transposed
            turned = True if version < (0, 19) else not marked if version < (0, 19, 1) else marked
            return (
                turned,
                f"an expert of a stack of square weights, as PEFT {adapter.config['peft_version']} with transformers 5 sees it",
            )
    raise AmbiguousNameError(
        f"{where}: the experts of {printable(tensor)} are square, and whether they are stored (out, in) or (in, out) is not known"
        " for this model and this adapter",
        hint="nothing was written; config.json needs the model_type, adapter_config.json the peft_version that trained it",
    )


def straightened(
    adapter: Adapter,
    slots: Mapping[str, tuple[Slot, ...]],
    present: Mapping[str, Matrix],
    checkpoint: Checkpoint,
    turned: Mapping[str, bool],
) -> Adapter:
    """`adapter` with the updates of experts transposed that were trained on a stack seen as (in, out) and go to parts (out, in).

    PEFT up to 0.18 saw every stack so. ΔW is the transpose of B @ A then, Aᵀ @ Bᵀ: of the same rank, its outputs the columns of A.

    Raises `AmbiguousNameError` where a square one may be either.
    """
    modules: dict[str, AdapterModule] = {}
    for name, module in adapter.modules.items():
        found = slots[name]
        if module.index is not None and not module.exchanged and len(found) > 1 and len(module.shape) == 2:
            straight = shape_of(found, present)
            ways = {way for way, shape in ((False, straight), (True, straight[::-1])) if module.shape == shape}
            where, others = f"{printable(adapter.name)}: {printable(name)}", turned.get(module.tensor.rpartition(".")[0])
            if len(ways) == 2:
                tensor, config = found[0].tensor, checkpoint.config
                ways = {expert_orientation(tensor, True, True, adapter, config, where, parameter=True, others=others)[0]}
            if ways == {True}:
                module = module.turned()
        modules[name] = module
    return replace(adapter, modules=modules)


def _version(text: Any) -> tuple[int, ...] | None:
    """The numbers that a version begins with.

    >>> _version("0.19.1.dev0"), _version(None)
    ((0, 19, 1), None)
    """
    found = re.match(r"\d+(?:\.\d+)*", text) if isinstance(text, str) else None
    return tuple(int(part) for part in found[0].split(".")) if found else None

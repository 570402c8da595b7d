"""From an adapter and a checkpoint to targets: for each LoRA pair and each replacement, the base tensor that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..adapters import Adapter, AdapterModule, TrainedRows
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, InputError, ShapeMismatchError, UnmatchedAdapterError, nearest_names, printable
from ..tensorfile import TensorInfo
from .components import named
from .copies import is_copy
from .families import EMBEDDINGS, HEADS, stored_transposed
from .names import Rename, find_rename
from .trained import check_trained
from .tying import find_tie

_MERGEABLE = ("BF16", "F16", "F32", "F64")
_CONV = "a convolution; if it has dilation or a padding_mode other than zeros, PEFT trained a function that no weight holds"


@dataclass(frozen=True)
class Target:
    """Where an update lands.

    - `tensor`: the base tensor's name
    - `transposed`: whether it is stored (in_features, out_features)
    - `rows`: which rows (start, stop) of the tensor, seen as a matrix as it is stored, the update is for; None for all of them
    - `section`: which rows (start, stop) of ΔW, as its layer has it, land there; None for all of them
    - `why`: what decided that, where it had to be decided
    """

    tensor: str
    transposed: bool = False
    why: str = ""
    rows: tuple[int, int] | None = None
    section: tuple[int, int] | None = None


@dataclass(frozen=True)
class Resolution:
    """Where everything in one adapter belongs.

    - `rename`: what was done to its names
    - `targets`: by module name, usually one each; `biases`: the base's bias for modules with a lora_bias
    - `replacements`: base tensor name by the adapter's name for it; not those that are the base's own numbers
    - `notes`: what a reader should know
    - `unmatched`: modules and replacements that were left out, as the adapter names them
    """

    rename: Rename
    targets: Mapping[str, tuple[Target, ...]]
    biases: Mapping[str, Target]
    replacements: Mapping[str, str]
    rows: Mapping[str, str]
    notes: tuple[str, ...]
    unmatched: tuple[str, ...] = ()


def resolve(adapter: Adapter, checkpoint: Checkpoint, *, allow_partial: bool = False) -> Resolution:
    """The targets of `adapter` in `checkpoint`; `allow_partial` leaves out what the base has no place for, if not all.

    Raises `UnmatchedAdapterError`, `AmbiguousNameError`, `ShapeMismatchError`, and `CheckpointError` for a base tensor of a type
    that nothing can be added to.
    """
    adapter, named_notes = named(adapter, checkpoint, allow_partial=allow_partial)
    tie = find_tie(checkpoint)
    tensors = dict(checkpoint.tensors)
    if tie is not None and not tie.stored:
        tensors[tie.head] = tensors[tie.embedding]
    names = adapter.tensor_names
    try:
        rename = find_rename(names, tensors, adapter=adapter.path, base=checkpoint.root, partial=allow_partial)
    except UnmatchedAdapterError as error:
        raise _quantised(checkpoint) or error from None
    adapter, unmatched = _matched(adapter, rename, tensors)
    replacements = {name: rename(name) for name in adapter.replacements}
    for name, tensor in replacements.items():
        _check_replacement(adapter.replacements[name], tensors[tensor], tensor, adapter)
    copies = {n for n, tensor in replacements.items() if is_copy(adapter, adapter.replacements[n], checkpoint, tensors[tensor])}
    replacements = {name: tensor for name, tensor in replacements.items() if name not in copies}
    present = tensors | {tensor: adapter.replacements[name] for name, tensor in replacements.items()}
    targets = {n: (_target(module, rename, tensors, present, adapter, checkpoint),) for n, module in adapter.modules.items()}
    rows = {name: rename(name) for name in adapter.rows}
    for name, tensor in rows.items():
        _check_rows(adapter.rows[name], tensors[tensor], tensor, adapter)
    notes = [] if rename == Rename() else [f"tensor names of {printable(adapter.name)} rewritten: {rename}"]
    notes += [*named_notes, *_reasons(targets)]
    return Resolution(
        rename=rename,
        targets=targets,
        biases={
            name: _bias_target(module, rename, tensors, adapter, checkpoint)
            for name, module in adapter.modules.items()
            if module.lora_bias is not None
        },
        replacements=replacements,
        rows=rows,
        notes=(*notes, *check_trained(adapter, rename, tensors)),
        unmatched=unmatched,
    )


def _matched(adapter: Adapter, rename: Rename, tensors: Mapping[str, TensorInfo]) -> tuple[Adapter, tuple[str, ...]]:
    """`adapter` with what the base has a place for, and the names of the rest."""
    modules = {name: module for name, module in adapter.modules.items() if rename(module.tensor) in tensors}
    replacements = {name: info for name, info in adapter.replacements.items() if rename(name) in tensors}
    rows = {name: trained for name, trained in adapter.rows.items() if rename(name) in tensors}
    matched = replace(adapter, modules=modules, replacements=replacements, rows=rows)
    left = [name.removesuffix(".weight") if name not in adapter.replacements else name for name in adapter.tensor_names]
    kept = [name.removesuffix(".weight") if name not in adapter.replacements else name for name in matched.tensor_names]
    return matched, tuple(name for name in left if name not in kept)


def _reasons(targets: Mapping[str, tuple[Target, ...]]) -> list[str]:
    """Why targets are what they are, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for name, target in ((name, target) for name, several in targets.items() for target in several):
        if target.why:
            by_reason.setdefault(target.why, []).append(printable(name))
    return [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}" for reason, names in by_reason.items()]


def _target(
    module: AdapterModule,
    rename: Rename,
    tensors: Mapping[str, TensorInfo],
    present: Mapping[str, TensorInfo],
    adapter: Adapter,
    checkpoint: Checkpoint,
) -> Target:
    """The target of one module; `present` holds what it is added to: the base's tensor, or the adapter's that replaces it."""
    name = rename(module.tensor)
    _check_mergeable(tensors[name], name, checkpoint)
    info = present[name]
    shape = module.shape
    where = f"{printable(adapter.name)}: {printable(module.name)}"
    if info.shape not in (shape, shape[::-1] if len(shape) == 2 else shape):
        raise ShapeMismatchError(
            f"{where} has lora_A {list(module.lora_A.shape)} and lora_B {list(module.lora_B.shape)}, so ΔW is {list(shape)},"
            f" but {printable(name)} in {printable(str(checkpoint.root))} is {list(info.shape)} ({printable(info.dtype)})",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if len(shape) != 2:
        return Target(name, why=_CONV if len(shape) > 2 else "")
    if module.embedding:
        if info.shape != shape:
            raise ShapeMismatchError(f"{where}: the embedding {printable(name)} is {list(info.shape)}, expected {list(shape)}")
        return Target(name)
    rows, columns = shape
    return _laid_out(name, info, rows, columns, where, adapter, checkpoint)


def _laid_out(name: str, info: TensorInfo, rows: int, columns: int, where: str, adapter: Adapter, checkpoint: Checkpoint) -> Target:
    """Whether the weight is stored (in, out): by the model's family first, by its shape, by the adapter's word last."""
    family = stored_transposed(name, checkpoint.config)
    straight, turned = info.shape == (rows, columns), info.shape == (columns, rows)
    if family is not None:
        if not turned:
            raise ShapeMismatchError(
                f"{where}: {family} stores {printable(name)} as (in, out), expected [{columns}, {rows}], found {list(info.shape)}"
            )
        return Target(name, transposed=True)
    config = checkpoint.config or {}
    if straight and turned and not isinstance(config.get("model_type", config.get("_class_name")), str):
        word = "(in, out)" if adapter.fan_in_fan_out else "(out, in)"
        why = f"a square weight of an unknown model is taken to be stored {word}, as fan_in_fan_out says"
        return Target(name, transposed=adapter.fan_in_fan_out, why=why)
    if straight:
        return Target(name)
    if adapter.fan_in_fan_out:
        return Target(name, transposed=True, why="stored (in, out), by its shape and the adapter's fan_in_fan_out")
    raise ShapeMismatchError(
        f"{where}: ΔW is [{rows}, {columns}], but {printable(name)} is {list(info.shape)}: only the transpose would fit",
        hint="if the model stores this weight as (in, out), set fan_in_fan_out to true in the adapter's configuration",
    )


def _bias_target(
    module: AdapterModule, rename: Rename, tensors: Mapping[str, TensorInfo], adapter: Adapter, checkpoint: Checkpoint
) -> Target:
    name = rename(f"{module.tensor.removesuffix('weight')}bias")
    where = f"{printable(adapter.name)}: {printable(module.name)} has a lora_bias"
    if name not in tensors:
        raise UnmatchedAdapterError(
            f"{where}, but the base has no {printable(name)} to add it to",
            unmatched=[name],
            nearest={name: nearest_names(name, tensors.keys())},
            hint="nothing was written; add a bias of zeros to the base model first, or train without lora_bias",
        )
    _check_mergeable(tensors[name], name, checkpoint)
    if tensors[name].shape != (module.lora_B.shape[0],):
        raise ShapeMismatchError(
            f"{where} of {module.lora_B.shape[0]} numbers, but {printable(name)} is {list(tensors[name].shape)}"
        )
    return Target(name)


def _check_mergeable(info: TensorInfo, name: str, checkpoint: Checkpoint) -> None:
    if info.dtype in _MERGEABLE:
        return
    raise _quantised(checkpoint, f"{printable(str(info.path))}: tensor '{printable(name)}'") or CheckpointError(
        f"{printable(str(info.path))}: tensor '{printable(name)}' is of type {printable(info.dtype)},"
        f" expected one of {', '.join(_MERGEABLE)}",
        hint="an update can only be added to floating-point numbers",
    )


def _quantised(checkpoint: Checkpoint, what: str | None = None) -> CheckpointError | None:
    """The error to raise where an update is meant for quantised numbers; None where the base does not say that it is quantised."""
    quantization = (checkpoint.config or {}).get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method = printable(str(quantization.get("quant_method", "of unknown kind")))
    return CheckpointError(
        f"{what or printable(str(checkpoint.root))} is quantised ({method}), expected {', '.join(_MERGEABLE)}",
        hint="an update cannot be added to quantised numbers; merge into the unquantised base, then quantise the result",
    )


def _check_rows(trained: TrainedRows, base: TensorInfo, name: str, adapter: Adapter) -> None:
    values, shape = trained.values, list(base.shape)
    if len(base.shape) != 2 or base.shape[1] != values.shape[1] or max(trained.indices, default=0) >= base.shape[0]:
        raise ShapeMismatchError(
            f"{printable(str(adapter.path))}: '{printable(values.name)}' {list(values.shape)} holds rows up to"
            f" {max(trained.indices, default=0)} of {printable(name)}, which is {shape}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if base.dtype not in _MERGEABLE or values.dtype not in _MERGEABLE:
        raise InputError(
            f"'{printable(values.name)}' of type {printable(values.dtype)} cannot replace rows of {printable(base.dtype)}"
        )


def _check_replacement(info: TensorInfo, base: TensorInfo, name: str, adapter: Adapter) -> None:
    """A replacement has the base's shape; an embedding or a head may have another number of rows, for another vocabulary."""
    resizable = name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS + HEADS
    fits = info.shape[1:] == base.shape[1:] and len(info.shape) == len(base.shape) if resizable else info.shape == base.shape
    if not fits:
        raise ShapeMismatchError(
            f"{printable(str(adapter.path))}: '{printable(info.name)}' replaces {printable(name)}, expected {list(base.shape)},"
            f" found {list(info.shape)}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    if info.torch_dtype is None or (info.dtype != base.dtype and base.dtype not in _MERGEABLE):
        raise InputError(f"'{printable(info.name)}' of type {printable(info.dtype)} cannot replace {printable(base.dtype)}")

"""Adapters of diffusion models: the base's own name for each module, whatever part of a pipeline it is of and however spelled.

Such adapters say of which part a module is, and trainers spell its path with underscores. A table is made of the base's real
names, each spelled as the adapter spells: what two names of the base share cannot be told apart, and is an error that names them.
Factors that were stored with other dimensions than the weight has (1 × 1 kernels of linear layers, flattened kernels) get its.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ...adapters.adapter import Adapter, AdapterModule, Scaling
from ...adapters.formats.diffusion.algebra import AS_IT_IS
from ...adapters.formats.diffusion.names import PIPELINE, component_of, folders_of, parts_of, underscored, within
from ...checkpoints.checkpoint import Checkpoint
from ...errors import AmbiguousNameError, ShapeMismatchError, UnmatchedAdapterError, printable
from ...files.expression import Matrix, Reshaped, Zeros
from ...files.safetensors.info import TensorInfo
from .makers.slots import CLIP, CLIP_G, CLIP_L, IMAGE
from .offers import Slot, shape_of

PLACES: Mapping[str, tuple[str, ...]] = {
    "unet": IMAGE,
    "transformer": IMAGE,
    "": IMAGE,
    "text_encoder": (*CLIP, CLIP_L),
    "text_encoder_2": (*CLIP_G, "text_encoders.t5xxl.transformer."),
    "text_encoder_3": ("", "text_encoder_3.", "text_encoders.t5xxl.transformer."),
}
"""What a part's tensor names may begin with in a base: nothing in a folder of its own, else what checkpoints of all parts write."""


def named(
    adapter: Adapter, checkpoint: Checkpoint, makers: Mapping[str, tuple[Slot, ...]], *, allow_partial: bool = False
) -> tuple[Adapter, tuple[str, ...]]:
    """`adapter` with the base's names for its tensors where it is of a diffusion model, and notes; any other as it is.

    - `makers`: further names of weights, and where the base stores them

    Names that are not found stay as they are.

    Raises `AmbiguousNameError` where a name fits several, `UnmatchedAdapterError` where a whole part has no place in the base,
    unless `allow_partial`, `ShapeMismatchError` where a DoRA scale does not fit.
    """
    if adapter.format not in PIPELINE:
        return adapter, ()
    offered = {**makers, **{name: (Slot(name),) for name in checkpoint.tensors}}
    found: dict[str, str] = {}
    absent: dict[str, list[str]] = {}
    notes: list[str] = []
    for component, names in parts_of(adapter).items():
        new = [_as_module(name, info) for name, info in adapter.replacements.items() if component_of(name) == component]
        place, matched = _matched(component, [*(adapter.modules[name] for name in names), *new], offered, adapter.path)
        found |= matched
        if not matched:
            absent[component] = names
        elif place:
            notes.append(f"{printable(adapter.name)}: {component or 'its modules'} found at '{place}' in the base")
    if absent and found and not allow_partial:
        raise _no_place(adapter, absent, checkpoint)
    modules = {
        name: _fitted(replace(module, tensor=found[name]), shape_of(offered[found[name]], checkpoint.tensors), adapter)
        if name in found
        else module
        for name, module in adapter.modules.items()
    }
    replacements = {found.get(name, name): info for name, info in adapter.replacements.items()}
    return replace(adapter, modules=modules, replacements=replacements), (*notes, *_lost_biases(modules, checkpoint.tensors))


def _matched(
    component: str, modules: list[AdapterModule], offered: Mapping[str, tuple[Slot, ...]], path: Path
) -> tuple[str, dict[str, str]]:
    """Where the part is in the base, and the base's tensor for each of its modules; those that match most where not all do."""
    places = dict.fromkeys(place for folder in folders_of(component) for place in PLACES.get(folder, ("", f"{folder}.")))
    spelled = bool(modules) and all(underscored(module.name) for module in modules)
    candidates: dict[str, dict[str, list[str]]] = {}
    for place in places:
        table = _table(place, component, offered, spelled=spelled)
        hits = {module.name: table[key] for module in modules if (key := _found(module, table)) is not None}
        if hits:
            candidates[place] = hits
    if not candidates:
        return "", {}
    most = max(len(hits) for hits in candidates.values())
    best = {place: hits for place, hits in candidates.items() if len(hits) == most}
    place, hits = next(iter(best.items()))
    for name in hits:
        several = list(dict.fromkeys(tensor for each in best.values() for tensor in each.get(name, ())))
        if len(several) > 1:
            raise AmbiguousNameError(
                f"{printable(str(path))}: {printable(name)} could be any of {len(several)} tensors of the base:\n"
                + "\n".join(f"  {printable(tensor)}" for tensor in several),
                hint="nothing was written; rename the adapter's tensors to those of the base that is meant",
            )
    return place, {name: tensors[0] for name, tensors in hits.items()}


def _as_module(name: str, info: TensorInfo) -> AdapterModule:
    """A tensor that replaces `name`, to be looked for as modules are."""
    return AdapterModule(name, info, info, Scaling(1.0, 1, 1.0, AS_IT_IS), tensor=name)


def _found(module: AdapterModule, table: Mapping[str, object]) -> str | None:
    """The tensor that the module is for, as the adapter calls it in its part; None where `table` does not have it.

    What is for no weight of a module but for a parameter of its own has the name of that alone.
    """
    path, _, parameter = module.tensor.rpartition(".")
    keys = [f"{within(path)}.{parameter}", within(path)] if module.scaling.why == AS_IT_IS else [f"{within(path)}.{parameter}"]
    return next((key for key in keys if key in table), None)


def _table(place: str, component: str, offered: Mapping[str, tuple[Slot, ...]], *, spelled: bool) -> dict[str, list[str]]:
    """What the base has `offered` at `place`, by all names that adapters have for it."""
    table: dict[str, list[str]] = {}
    for tensor in offered:
        if tensor.startswith(place):
            module, _, parameter = tensor[len(place) :].rpartition(".")
            for name in _names(module, component):
                key = f"{name.replace('.', '_') if spelled else name}.{parameter}".removeprefix(".")
                entry = table.setdefault(key, [])
                if all(offered[tensor] != offered[other] for other in entry):
                    entry.append(tensor)
    return table


def _names(module: str, component: str) -> Iterator[str]:
    """What a module of the base may be called: transformers 5 leaves out `text_model.`, trainers of Qwen3 `model.`.

    Some files of FLUX.2 have lost the first letters of `transformer_blocks`.
    """
    yield module
    if any(folder.startswith("text_encoder") for folder in folders_of(component)):
        yield f"text_model.{module}"
        yield module.removeprefix("text_model.")
        yield module.removeprefix("model.")
    elif module.startswith("transformer_blocks."):
        yield module.removeprefix("tran")


def _fitted(module: AdapterModule, base: tuple[int, ...], adapter: Adapter) -> AdapterModule:
    """`module` with the dimensions of its weight `base`, where it has as many numbers and lacks or adds those of the kernel."""
    if module.transform is not None:
        if (wanted := module.transform.lacks(base)) is not None:
            raise ShapeMismatchError(
                f"{printable(adapter.name)}: {printable(module.name)} is {module.transform.kind} of a weight with {wanted}, but"
                f" {printable(module.tensor)} is {list(base)}",
                hint="nothing was written; check that the adapter was trained on this base model",
            )
        return replace(module, lora_A=Zeros((1, *base[1:])), lora_B=Zeros((base[0], 1)))
    shape = module.shape
    if len(shape) > 1 and len(base) > 1 and shape != base:
        plain = len(shape) == 2 or (len(base) == 2 and all(size == 1 for size in shape[2:]))
        if plain and shape[0] == base[0] and math.prod(shape[1:]) == math.prod(base[1:]):
            module = replace(module, lora_A=Reshaped(module.lora_A, (module.lora_A.shape[0], *base[1:])))
    scale = module.magnitude
    if scale is not None and module.magnitude_axis < len(base) and scale.numel != base[module.magnitude_axis]:
        raise ShapeMismatchError(
            f"{printable(adapter.name)}: the DoRA scale of {printable(module.name)} is {list(scale.shape)}, but"
            f" {printable(module.tensor)} is {list(base)}",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    return module


def _no_place(adapter: Adapter, absent: Mapping[str, list[str]], checkpoint: Checkpoint) -> UnmatchedAdapterError:
    names = [name for several in absent.values() for name in several]
    parts = " and ".join(f"{len(several)} modules for {printable(part or 'no part')}" for part, several in absent.items())
    there = [folders_of(part)[0] for name in adapter.modules if (part := component_of(name)) not in absent]
    return UnmatchedAdapterError(
        f"{printable(str(adapter.path))} holds {parts}, of which {printable(str(checkpoint.root))} has none",
        unmatched=[printable(name) for name in names],
        nearest={},
        hint="nothing was written; give the folder of the whole pipeline, or merge one part alone:"
        f" `ReadOptions(component='{there[0] if there else 'unet'}')`",
    )


def _lost_biases(modules: Mapping[str, AdapterModule], tensors: Mapping[str, Matrix]) -> Iterator[str]:
    """A note on whole differences without one for the bias that the base has there: LyCORIS saves both."""
    held = {module.tensor for module in modules.values()}
    biases = (
        f"{module.tensor.removesuffix('.weight')}.bias"
        for module in modules.values()
        if module.scaling.why == AS_IT_IS and module.tensor.endswith(".weight")
    )
    lack = [bias for bias in biases if bias in tensors and bias not in held]
    if lack:
        yield f"the adapter changes whole weights, but nothing of {len(lack)} biases beside them, as {printable(lack[0])}"

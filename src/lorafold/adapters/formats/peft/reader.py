"""PEFT's directory: `adapter_config.json` and `adapter_model.safetensors`, as an `Adapter`.

What a tensor's name says is told in `peftnames`, what the tensors of a module make in `peftpairs`, bare parameters in
`peftparameters`, the configuration in `peftconfig`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ....errors import AdapterError, printable
from ....files.safetensors.info import Header, TensorInfo
from ....files.safetensors.mapped import opened
from ...adapter import Adapter, AdapterModule, Base, TrainedRows
from ...read_options import ReadOptions
from ...source import Source, look
from .config import CONFIG_NAME, PeftConfig, config_of, read_config
from .hadamard import is_product, load_product
from .names import Sorted, sort_tensors
from .pairs import attention_output, pair_of, pooled
from .parameters import check_all_there, is_stacked, parameters_of, split_parameters, stacked

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def load_peft(source: Source) -> Adapter:
    """The adapter in the folder of `source`.

    Raises `AdapterError` (or a kind of it) where files are missing, contradict each other, or hold what cannot be merged.
    """
    given = source.options.initial_adapter
    name = source.find(WEIGHTS_NAME, PICKLE_NAME) or WEIGHTS_NAME
    if is_product(source, name):
        return load_product(source, name)
    config = config_of(dict(source.config(CONFIG_NAME)), source.folder / CONFIG_NAME, initial_known=given is not None)
    weights, header = source.folder / name, source.header(name)
    found = sort_tensors(header.tensors, config, weights)
    _check_twins(found, header)
    _check_tied(found, header)
    rows = _rows(found.tokens, config, weights)
    if not found.modules and not found.replacements and not rows:
        raise AdapterError(f"{printable(str(weights))} holds no tensors")
    modules = _modules(found, config, source.options, weights, None)
    adapter = Adapter(
        name=source.folder.resolve().name,
        path=source.folder,
        format="peft",
        modules=modules,
        replacements=found.replacements,
        header=header,
        sha256=source.sha256(CONFIG_NAME, name),
        config=config.fields,
        base_model=config.base_model,
        fan_in_fan_out=config.fan_in_fan_out,
        notes=(*config.notes, *config.overlaps(modules), *_notes(found, modules, config, source.options)),
        rows=rows,
        left_out=found.left_out,
        unasked=frozenset(found.replacements[name].name for name in found.ends),
        layers=config.layer_replication,
    )
    if given is not None:
        adapter = _with_initial(adapter, Path(given), config, source.options)
    if not config.target_parameters and config.qalora_group is None:
        return adapter

    def on_base(base: Base) -> Adapter:
        modules = _modules(found, config, source.options, weights, base)
        notes = check_all_there([module.tensor for module in modules.values()], config, base, weights)
        return replace(adapter, modules=modules, notes=(*adapter.notes, *notes))

    return replace(adapter, on_base=on_base)


def _with_initial(adapter: Adapter, given: Path, config: PeftConfig, options: ReadOptions) -> Adapter:
    """`adapter` with the one at `given`, which it was before training.

    Raises `AdapterError` where that has not the same pairs.
    """
    if config.init != "given":
        init = printable(str(config.fields.get("init_lora_weights", True)))
        note = f"the initial adapter is not used for {printable(adapter.name)}, whose init_lora_weights is {init}"
        return replace(adapter, notes=(*adapter.notes, note))
    source = look(given, options)
    read = read_config(source.folder / CONFIG_NAME, initial_known=True)
    name = source.find(WEIGHTS_NAME, PICKLE_NAME) or WEIGHTS_NAME
    header = source.header(name)
    modules = _modules(sort_tensors(header.tensors, read, header.path), read, options, header.path, None)
    for module in adapter.modules.values():
        other = modules.get(module.name)
        if module.residual is not None and (other is None or other.shape != module.shape):
            raise AdapterError(
                f"{printable(str(given))} has {'nothing' if other is None else f'ΔW {list(other.shape)}'} for"
                f" {printable(module.name)}, of which {printable(str(adapter.path))} has ΔW {list(module.shape)}",
                hint="`ReadOptions(initial_adapter=…)` is the same adapter, saved before it was trained; nothing was written",
            )
    initial = replace(
        adapter, name=source.name, path=given, modules=modules, header=header, sha256=source.sha256(CONFIG_NAME, name)
    )
    both = hashlib.sha256(f"{adapter.sha256} {initial.sha256}".encode()).hexdigest()
    note = f"what {printable(adapter.name)} took out of the base before training is the update of {printable(initial.name)}"
    return replace(adapter, initial=initial, sha256=both, notes=(*adapter.notes, note))


def _modules(found: Sorted, config: PeftConfig, options: ReadOptions, weights: Path, base: Base | None) -> dict[str, AdapterModule]:
    """All updates of the file by name; without a base as far as the files tell."""
    plain, wrapped = split_parameters(found.modules, config, base)
    for name, around in found.inside.items():
        if around not in plain and around not in wrapped:
            raise AdapterError(
                f"{printable(str(weights))}: {printable(name)} lies in {printable(around)}, which was adapted too, but of which"
                " there is nothing",
                hint="tensors were lost; nothing was written",
            )
    modules: dict[str, AdapterModule] = {}
    for name, parts in plain.items():
        if is_stacked(parts):
            modules |= {module.name: module for module in stacked(name, parts, config, weights)}
            continue
        outer = found.inside.get(name)
        attention = outer if outer is not None and outer in plain and name == f"{outer}.out_proj" else None
        module = pair_of(name, parts, config, weights, dense_groups=options.dense_groups, within=attention)
        if attention is not None:
            module = attention_output(module, config, options.out_proj_factor, weights)
        if config.qalora_group is not None:
            shape = None if base is None else base.shape_of(module.tensor)
            module = pooled(module, config.qalora_group, None if shape is None else shape[-1])
        modules[name] = module
    for path, wrappers in wrapped.items():
        for module in parameters_of(path, wrappers, config, options.expert_layout, base, weights):
            modules[module.name] = module
    return modules


def _check_twins(found: Sorted, header: Header) -> None:
    """Leave out what is saved twice. Raises `AdapterError` where the two are not the same."""
    if not found.twins:
        return
    with opened(header) as file:
        for name, target in found.twins.items():
            one, other = header.tensors[name], found.replacements.get(target)
            if other is None or one.torch_dtype is None or not torch.equal(file.read(one), file.read(other)):
                raise AdapterError(
                    f"{printable(str(header.path))}: '{printable(name)}' is not what the file has for {printable(target)}",
                    hint="the file was changed after it was saved; nothing was written",
                )
            found.left_out[name] = f"it is '{printable(other.name)}' once more"


def _check_tied(found: Sorted, header: Header) -> None:
    """Take weights that PEFT saved because they are tied to one of modules_to_save, which its configuration then does not name.

    Raises `AdapterError` where one has not the numbers of any.
    """
    if not found.tied:
        return
    with opened(header) as file:
        for target, info in found.tied.items():
            same = [each for each in found.replacements.values() if (each.shape, each.dtype) == (info.shape, info.dtype)]
            if info.torch_dtype is None or not any(torch.equal(file.read(info), file.read(each)) for each in same):
                raise AdapterError(
                    f"{printable(str(header.path))}: tensor '{printable(info.name)}' is not part of a LoRA pair, modules_to_save"
                    " does not name it, and it is tied to nothing that it names",
                    hint="the file holds more than its configuration says; nothing was written",
                )
            found.replacements[target] = info


def _notes(found: Sorted, modules: Mapping[str, AdapterModule], config: PeftConfig, options: ReadOptions) -> list[str]:
    """What a reader should know of how the files were understood."""
    notes = []
    if any(module.index is not None for module in modules.values()) and options.expert_layout is None:
        notes.append(
            "lora_B of experts is read as PEFT packs it, all experts for each number of the rank;"
            " `ReadOptions(expert_layout='expert-major')` reads it one expert after the other, as Unsloth trained it until"
            " September 2026"
        )
    grouped = next((name for name, module in modules.items() if module.groups > 1), None)
    if grouped is not None:
        notes.append(
            f"{printable(grouped)} and others in groups are written as dense convolutions: the model must be built with groups=1"
            " there"
        )
    if found.around:
        notes.append(f"tensor names rewritten: {', '.join(sorted(found.around))} taken out, which wraps modules")
    if found.ends:
        many = f" and {len(found.ends) - 1} more" if len(found.ends) > 1 else ""
        notes.append(
            f"{printable(found.ends[0])}{many} stand in the file, though its configuration does not name them: PEFT saves both ends"
            " of a model whose vocabulary was resized"
        )
    by_reason: dict[str, list[str]] = {}
    for name, why in found.left_out.items():
        by_reason.setdefault(why, []).append(printable(name))
    notes += [
        f"not merged, since {why}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for why, names in by_reason.items()
    ]
    if config.init is not None:
        kind = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA", "given": "it"}[config.init]
        notes.append(
            f"{kind} trained on what was left of the base weights: that is computed anew, and rounded to the base's dtype, as PEFT"
            " does to a base that was loaded in it"
        )
    return notes


def _rows(tokens: Mapping[str, TensorInfo], config: PeftConfig, weights: Path) -> dict[str, TrainedRows]:
    """The trained rows of each embedding. PEFT calls them a delta, but they are the new rows themselves."""
    rows = {}
    used = set()
    for module, info in tokens.items():
        keys = [key for key in config.token_indices if not key or module.endswith(key)]
        if len(keys) != 1:
            raise AdapterError(
                f"{printable(str(weights))}: '{printable(info.name)}' holds trained rows, and {len(keys)} entries of"
                " trainable_token_indices say which, expected 1"
            )
        indices = config.token_indices[keys[0]]
        if len(info.shape) != 2 or info.shape[0] != len(indices):
            raise AdapterError(
                f"{printable(str(weights))}: '{printable(info.name)}' must be [{len(indices)}, …], a row for each of"
                f" trainable_token_indices, found {list(info.shape)}"
            )
        used.add(keys[0])
        rows[f"{module}.weight"] = TrainedRows(info, indices)
    for key in config.token_indices.keys() - used:
        raise AdapterError(
            f"{printable(str(weights))} holds no rows for trainable_token_indices{f' of {printable(key)}' if key else ''}",
            hint="tensors were lost, or the configuration is not of this file; nothing was written",
        )
    return rows

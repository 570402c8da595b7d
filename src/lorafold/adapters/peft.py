"""PEFT's directory: `adapter_config.json` and `adapter_model.safetensors`. Each tensor's name says its module and its part.

`base_model.model.` + the module's path + `.lora_A.weight`, `.lora_B.weight`, `.lora_B.bias` (lora_bias), `.lora_embedding_A`,
`.lora_embedding_B`; biases that were trained and modules that were saved whole stand beside them under their own names. PEFT
drops the adapter's name (`lora_A.default.weight`) when it saves; files that kept it are read too, and so are those of a model
that was wrapped once more around PEFT's (`module.`, `_orig_mod.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AdapterError, UnsupportedAdapterError, nearest_names, printable
from ..tensorfile import TensorInfo
from .adapter import Adapter, AdapterModule, TrainedRows
from .peftconfig import CONFIG_NAME, PeftConfig, read_config
from .source import Source

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_PREFIX = re.compile(r"(?:(?:module|_orig_mod)\.)*base_model\.model\.")
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?P<adapter>[^.]+?))??(?:\.(?P<kind>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<parameter>[^.]+)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_OTHER = re.compile(r".+\.(lora_[A-Za-z_]+|token_adapter|vera_[a-z_]+|hada_\w+|ia3_l)(\..+)?")


@dataclass
class _Parts:
    """The tensors of one module while they are gathered."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)


def load_peft(source: Source) -> Adapter:
    """The adapter in the folder of `source`.

    Raises `AdapterError` (or a kind of it) where files are missing, contradict each other, or hold what cannot be merged.
    """
    config = read_config(source.folder / CONFIG_NAME)
    name = source.find(WEIGHTS_NAME, PICKLE_NAME) or WEIGHTS_NAME
    weights, header = source.folder / name, source.header(name)
    modules, others, tokens = _sort(header.tensors, config, weights)
    replacements, rows = others, _rows(tokens, config, weights)
    if not modules and not replacements and not rows:
        raise AdapterError(f"{printable(str(weights))} holds no tensors")
    built = {name: _module(name, parts.tensors, config, weights) for name, parts in modules.items()}
    _check_targets(config, built, weights)
    return Adapter(
        name=source.folder.resolve().name,
        path=source.folder,
        format="peft",
        modules=built,
        replacements=replacements,
        header=header,
        sha256=source.sha256(CONFIG_NAME, name),
        config=config.fields,
        base_model=config.base_model,
        fan_in_fan_out=config.fan_in_fan_out,
        notes=(*config.notes, *config.overlaps(built)),
        rows=rows,
    )


def _sort(
    tensors: Mapping[str, TensorInfo], config: PeftConfig, weights: Path
) -> tuple[dict[str, _Parts], dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Every tensor of the file, as a part of a module's pair, a replacement or an embedding's trained rows; none is left over."""
    modules: dict[str, _Parts] = {}
    replacements: dict[str, TensorInfo] = {}
    tokens: dict[str, TensorInfo] = {}
    adapters: set[str] = set()
    for name, info in tensors.items():
        plain = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
        if found := _LORA.fullmatch(plain):
            part = found["part"] + (".bias" if found["kind"] == "bias" else "")
            if found["adapter"]:
                adapters.add(found["adapter"])
            parts = modules.setdefault(found["module"], _Parts()).tensors
            if part in parts:
                raise AdapterError(
                    f"{printable(str(weights))}: {printable(name)} and {printable(parts[part].name)} are the same part"
                )
            parts[part] = info
        elif (found := _TOKENS.fullmatch(plain)) and found["module"] not in tokens:
            tokens[found["module"]] = info
        else:
            target = _replaced(plain, config, name, weights)
            if target in replacements:
                raise AdapterError(
                    f"{printable(str(weights))}: {printable(name)} and {printable(replacements[target].name)}"
                    f" both replace {printable(target)}"
                )
            replacements[target] = info
    if len(adapters) > 1:
        raise AdapterError(
            f"{printable(str(weights))} holds several adapters: {', '.join(printable(each) for each in sorted(adapters))}",
            hint="save each by itself",
        )
    return modules, replacements, tokens


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


def _replaced(plain: str, config: PeftConfig, name: str, weights: Path) -> str:
    """The base tensor that the whole tensor `plain` replaces."""
    shown = f"{printable(str(weights))}: tensor '{printable(name)}'"
    if _OTHER.fullmatch(plain):
        raise UnsupportedAdapterError(f"{shown} belongs to a kind of adapter that is not supported", hint="nothing was written")
    if saved := _SAVED.fullmatch(plain):
        return f"{saved['module']}.{saved['parameter']}"
    module, _, parameter = plain.rpartition(".")
    if module.endswith(".base_layer") and (parameter == "weight" or (parameter == "bias" and config.bias != "none")):
        return f"{module.removesuffix('.base_layer')}.{parameter}"
    if any(part.endswith(config.modules_to_save) for part in _above(module)) or (parameter == "bias" and config.bias != "none"):
        return plain
    reason = "" if parameter != "bias" else f", and bias is '{config.bias}'"
    raise AdapterError(
        f"{shown} is not part of a LoRA pair, and modules_to_save does not name it{reason}",
        hint="the file holds more than its configuration says; nothing was written",
    )


def _module(name: str, parts: Mapping[str, TensorInfo], config: PeftConfig, weights: Path) -> AdapterModule:
    shown = f"{printable(str(weights))}: {printable(name)}"
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for have, lack in ((first, second), (second, first)):
        if lack not in parts:
            raise AdapterError(f"{shown} has {have} but no {lack}", hint="the file is not complete; nothing was written")
    extra = parts.keys() - {first, second, "lora_B.bias", "lora_magnitude_vector"}
    if extra or (embedding and "lora_B.bias" in parts):
        raise AdapterError(f"{shown} has {', '.join(sorted(parts))}, which is not one LoRA pair")
    lora_A, lora_B = parts[first], parts[second]
    _check_shapes(lora_A, lora_B, first, second, shown)
    for info in parts.values():
        if info.torch_dtype is None or not info.torch_dtype.is_floating_point or info.torch_dtype.itemsize < 2:
            raise AdapterError(
                f"{shown}: '{printable(info.name)}' is of type {printable(info.dtype)}, expected 16 to 64-bit floats"
            )
    lora_bias = parts.get("lora_B.bias")
    if lora_bias is not None and lora_bias.shape != (lora_B.shape[0],):
        raise AdapterError(f"{shown}: lora_B.bias must be [{lora_B.shape[0]}], found {list(lora_bias.shape)}")
    if not embedding and config.lora_bias != (lora_bias is not None):
        said, found = ("true", "is missing") if config.lora_bias else ("false", "is there")
        raise AdapterError(f"{shown}: lora_bias is {said}, but lora_B.bias {found}")
    magnitude = parts.get("lora_magnitude_vector")
    module = AdapterModule(name, lora_A, lora_B, config.scaling(name, lora_A.shape[0]), embedding, lora_bias, magnitude)
    if config.use_dora != (magnitude is not None):
        said, found = ("true", "is missing") if config.use_dora else ("false", "is there")
        raise AdapterError(f"{shown}: use_dora is {said}, but lora_magnitude_vector {found}")
    outputs = module.shape[1] if embedding else module.shape[0]
    if magnitude is not None and magnitude.numel != outputs:
        raise AdapterError(f"{shown}: lora_magnitude_vector must hold {outputs} numbers, found {list(magnitude.shape)}")
    return module


def _check_shapes(lora_A: TensorInfo, lora_B: TensorInfo, first: str, second: str, shown: str) -> None:
    """lora_A is (r, in, *kernel) and lora_B (out, r, 1, …), with no kernel where the layer is not a convolution."""
    found = f"found {list(lora_A.shape)} and {list(lora_B.shape)}"
    if len(lora_A.shape) < 2 or len(lora_A.shape) != len(lora_B.shape):
        raise AdapterError(f"{shown}: {first} must be (r, …) and {second} (…, r), {found}")
    if any(size != 1 for size in lora_B.shape[2:]):
        raise AdapterError(f"{shown}: {second} of a convolution must be (out, r, 1, …), {found}")
    if lora_A.shape[0] == lora_B.shape[1]:
        return
    if len(lora_A.shape) > 2 and lora_A.shape[0] % lora_B.shape[1] == 0:
        raise UnsupportedAdapterError(
            f"{shown} belongs to a convolution in {lora_A.shape[0] // lora_B.shape[1]} groups, {found}: its update mixes the"
            " groups, which the grouped weight cannot hold",
            hint="nothing was written; serve this adapter unmerged",
        )
    raise AdapterError(f"{shown}: {first} must be (r, …) and {second} (…, r), {found}")


def _check_targets(config: PeftConfig, modules: Mapping[str, AdapterModule], weights: Path) -> None:
    """Every module type that the configuration lists is in the file: one that is not was lost on the way."""
    if isinstance(config.target_modules, str):
        return
    absent = [
        target
        for target in config.target_modules
        if not any(_is_or_ends(name, target) or _is_or_ends(target, name) for name in modules)  # either may have a longer prefix
    ]
    if absent:
        found = sorted({name.rpartition(".")[2] for name in modules})
        near = [f"   (did you mean {n[0]}?)" if (n := nearest_names(target, found)) else "" for target in absent]
        raise AdapterError(
            f"{printable(str(weights))} holds nothing for {len(absent)} of the {len(config.target_modules)} target_modules:\n"
            + "\n".join(f"  {printable(target)}{tip}" for target, tip in zip(absent, near, strict=True))
            + f"\nit holds {', '.join(printable(name) for name in found) or 'no LoRA pairs'}",
            hint="tensors were lost, or the configuration is not of this file; nothing was written",
        )


def _is_or_ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _above(module: str) -> list[str]:
    """`module` and the modules around it, innermost first."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]

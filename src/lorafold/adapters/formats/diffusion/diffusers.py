"""diffusers' single file: the folder of the pipeline, the module's path there, and PEFT's ending, or one of those before it.

`unet.` or `transformer.`, `text_encoder.`, …, then `….lora_A.weight` and `….lora_B.weight`; older `….lora.down.weight`,
`….to_q_lora.down.weight` of an attention processor, `….lora_linear_layer.down.weight` of a text encoder. The factor is that of
the PEFT configuration of each component in the file's metadata, or of tensors `….alpha`, or 1, alpha being the rank of the module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, nearest_names, printable
from ....files import strictjson
from ....files.safetensors.info import Header, TensorInfo
from ...adapter import Adapter, AdapterModule, Scaling
from ...read_options import ReadOptions
from ...source import Source
from ..peft.config import PeftConfig, config_of
from ..single_file import (
    Parts,
    check_floats,
    check_shape,
    open_one,
    read_alphas,
    scaling_of,
    settle_alphas,
    single_file,
    some,
    tensor_file,
)
from .algebra import WHOLE, pair, whole
from .kohya import settle_split, split_modules
from .names import WRAPPED, component_of, embeddings_in, of_lycoris, underscored, within

METADATA_KEY = "lora_adapter_metadata"
"""Under which the metadata of the file has the configurations, each field's name after that of its component."""

_SIDE = {"lora_A": "lora_down", "lora_B": "lora_up", "down": "lora_down", "up": "lora_up"}
_NAMED = r"(?:\.default(?:_\d+)?)?"
_FORMS = (
    re.compile(r"(?P<module>.*(?:double|single)_blocks\.\d+)\.(?P<xlabs>(?:qkv|proj)_lora[12]?)\.(?P<side>down|up)\.weight"),
    re.compile(rf"(?P<module>.+)\.(?P<side>lora_A|lora_B){_NAMED}(?:\.weight)?"),
    re.compile(rf"(?P<module>.+)\.(?P<bias>lora_B){_NAMED}\.bias"),
    re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<module>.+)\.lora_(?P<side>down|up)(?:\.weight)?"),
    re.compile(r"(?P<module>.+)\.(?P<old>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"),
    re.compile(rf"(?P<module>.+)\.(?P<magnitude>lora_magnitude_vector){_NAMED}(?:\.weight)?"),
    re.compile(r"(?P<module>.+)\.(?P<alpha>alpha)"),
)
_XLABS = {
    "qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj", "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1.qkv", "proj_lora": "linear2",
}  # fmt: skip
"""What the attention processors of x-flux are for; in a single block the first is for query, key and value of `linear1` alone."""
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What attention processors called the projections of a text encoder."""


@dataclass(frozen=True)
class _Part:
    """One tensor: its module, what it is of it, and whether its name has PEFT's ending."""

    module: str
    part: str
    peft: bool


def is_diffusers(source: Source) -> bool:
    """Whether it is one file of tensors, named after the folders of a pipeline or as diffusers named them before."""
    name = tensor_file(source)
    names = source.header(name).tensors if name is not None else {}
    bare = any(each.endswith((".lora_A", ".lora_B")) for each in names)  # loralib's, unless it is said
    if bare or any(underscored(each) for each in names) or of_lycoris(names):
        return False
    return any(
        _split(each) is not None
        and (component_of(each) not in ("", WRAPPED) or ".processor." in each or ".lora_linear_layer." in each)
        for each in names
    )


def may_be_diffusers(source: Source) -> bool:
    """Whether it is one file of tensors whose endings are this format's, though nothing says that it is of a diffusion model."""
    name = tensor_file(source)
    names = source.header(name).tensors if name is not None else {}
    return bool(names) and all(_split(each) is not None for each in names)


def load_diffusers(source: Source) -> Adapter:
    """The adapter in the one file of `source`.

    Raises `AdapterError` where tensors are missing, do not fit each other or are not known, where the factor cannot be told, or
    the metadata says otherwise than the tensors.
    """
    header = open_one(source)
    shown = printable(str(header.path))
    gathered, peft = _gather(header, shown)
    configs = _configs(header)
    scalings: dict[str, Scaling] = {}
    notes: list[str] = []
    for component in dict.fromkeys(component_of(module) for module in gathered):
        here = {module: parts for module, parts in gathered.items() if component_of(module) == component}
        _check_parts(here, configs.get(component), shown)
        found, more = _scalings(here, component, configs.get(component), header, source.options, peft=peft)
        scalings |= found
        notes += more
    modules = {
        module: AdapterModule(
            module,
            parts["lora_down"],
            parts["lora_up"],
            scalings[module],
            lora_bias=parts.get("lora_bias") if component_of(module) in configs else None,
            magnitude=parts.get("magnitude"),
        )
        for module, parts in gathered.items()
    }
    for module, parts in gathered.items():  # without a configuration it is a difference of the bias as it is
        bias = parts.get("lora_bias")
        if bias is not None and component_of(module) not in configs:
            added, name = whole(bias, f"{shown}: {printable(module)}"), f"{module}.lora_B.bias"
            modules[name] = AdapterModule(name, added.lora_A, added.lora_B, WHOLE, tensor=f"{module}.bias")
    stray = sorted(component for component in configs if component not in {component_of(module) for module in gathered})
    if stray:
        raise AdapterError(
            f"{shown}: {METADATA_KEY} has a configuration for {some(stray)}, for which the file holds nothing",
            hint="tensors were lost; nothing was written",
        )
    config: Mapping[str, Any] = {name: dict(each.fields) for name, each in configs.items()}
    return single_file(source, header, modules, "diffusers", notes=tuple(dict.fromkeys(notes)), config=config)


def _split(name: str) -> _Part | None:
    """The module and the part that a tensor's name says; None where it is none of this format."""
    plain = name.replace(".processor.", ".").replace(".base_model.model.", ".")
    found = next((found for form in _FORMS if (found := form.fullmatch(plain))), None)
    if found is None:
        return None
    groups, module = found.groupdict(), found["module"]
    if groups.get("xlabs") is not None:
        if groups["xlabs"] not in _XLABS:
            return None
        module = f"{module}.{_XLABS[groups['xlabs']]}"
    old, text = groups.get("old"), component_of(name).startswith("text_encoder")
    if old is not None:
        module = f"{module}.{_OLD_TEXT[old] if text else 'to_out.0' if old == 'to_out' else old}"
    if groups.get("magnitude") and module.endswith(".to_out"):
        module += ".0"
    side = groups.get("side")
    part = _SIDE[side] if side else "lora_bias" if groups.get("bias") else "magnitude" if groups.get("magnitude") else "alpha"
    return _Part(module, part, side in ("lora_A", "lora_B"))


def _gather(header: Header, shown: str) -> tuple[dict[str, dict[str, TensorInfo]], bool]:
    """The parts of each module, and whether the names have PEFT's endings."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    peft = False
    left = embeddings_in(header.tensors)
    for name, info in header.tensors.items():
        if name in left:
            continue
        found = _split(name)
        if found is None:
            near = nearest_names(name, header.tensors.keys() - {name})
            raise AdapterError(
                f"{shown}: tensor '{printable(name)}' is no part of a LoRA pair",
                hint=f"is it meant to be beside {printable(near[0])}? Nothing was written" if near else "nothing was written",
            )
        parts = modules.setdefault(found.module, {})
        if found.part in parts:
            raise AdapterError(
                f"{shown}: '{printable(name)}' and '{printable(parts[found.part].name)}' are the same part of"
                f" {printable(found.module)}"
            )
        parts[found.part] = info
        peft = peft or found.peft
    if not modules:
        raise AdapterError(f"{shown} holds no tensors")
    return modules, peft


def _configs(header: Header) -> dict[str, PeftConfig]:
    """The PEFT configuration of each component, from the metadata; none where it has none."""
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    where = f"{header.path}: {METADATA_KEY}"
    flat = strictjson.parse(text, where, error=AdapterConfigError)
    if not isinstance(flat, dict):
        raise AdapterConfigError(f"{printable(where)} must hold an object, not {type(flat).__name__}")
    fields: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, _, field = name.partition(".")
        fields.setdefault(component, {})[field] = value
    return {component: config_of({"peft_type": "LORA", **each}, header.path) for component, each in fields.items()}


def _check_parts(modules: Mapping[str, Parts], config: PeftConfig | None, shown: str) -> None:
    dora = [module for module, parts in modules.items() if "magnitude" in parts]
    for module, parts in modules.items():
        where = f"{shown}: {printable(module)}"
        for lack in ("lora_down", "lora_up"):
            if lack not in parts:
                raise AdapterError(
                    f"{where} has {some([each.name for each in parts.values()])} but no {lack}",
                    hint="the file is not complete; nothing was written",
                )
        check_floats(parts, where)
        B = pair(parts, where).lora_B
        magnitude, bias = parts.get("magnitude"), parts.get("lora_bias")
        if magnitude is not None:
            check_shape(magnitude, f"{B.shape[0]} numbers", magnitude.numel == B.shape[0], where)
        if bias is not None:
            check_shape(bias, f"[{B.shape[0]}]", bias.shape == (B.shape[0],), where)
        wanted = bool(dora) if config is None else config.use_dora
        if wanted != (magnitude is not None):
            why = f"as {printable(dora[0])} has" if config is None else f"use_dora being {str(config.use_dora).lower()}"
            raise AdapterError(f"{where} has {'no' if wanted else 'a'} lora_magnitude_vector, {why}", hint="nothing was written")
    if config is None:
        return
    biased = {module for module, parts in modules.items() if "lora_bias" in parts}
    if config.lora_bias != bool(biased) or (biased and len(biased) < len(modules)):
        raise AdapterError(f"{shown}: lora_bias is {str(config.lora_bias).lower()}, but {len(biased)} modules have lora_B.bias")
    if config.init is not None:
        raise UnsupportedAdapterError(
            f"{shown}: init_lora_weights of {printable(next(iter(modules)))} and others changes the base weight before training",
            hint="convert the adapter to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    if not isinstance(config.target_modules, str):
        lost = [t for t in config.target_modules if not any(f".{module}".endswith(f".{t}") for module in modules)]
        if lost:
            raise AdapterError(f"{shown} holds nothing for {some(lost)} of target_modules", hint="tensors were lost")


def _scalings(
    modules: Mapping[str, Parts], component: str, config: PeftConfig | None, header: Header, options: ReadOptions, *, peft: bool
) -> tuple[dict[str, Scaling], list[str]]:
    """The factor of each module of a component, and notes."""
    shown = printable(str(header.path))
    ranks = {module: parts["lora_down"].shape[0] for module, parts in modules.items()}
    stored = read_alphas(header, modules)
    if config is not None:
        scalings = {module: config.scaling(within(module), r) for module, r in ranks.items()}
        for module, alpha in stored.items():
            if alpha / ranks[module] != scalings[module].value:
                raise AdapterError(
                    f"{shown}: '{printable(modules[module]['alpha'].name)}' is {alpha:g}, so the factor is"
                    f" {alpha / ranks[module]:g}, but {METADATA_KEY} makes it {scalings[module].value:g} ({scalings[module].why})",
                    hint="the two are not of one training run",
                )
        return scalings, [*config.notes, *config.overlaps([within(module) for module in modules])]
    off = [module for module, alpha in stored.items() if alpha != ranks[module]]
    if off and peft and component == "unet" and options.alpha_tensors is None:
        name, alpha = off[0], stored[off[0]]
        raise AdapterError(
            f"{shown}: '{printable(modules[name]['alpha'].name)}' is {alpha:g} beside lora_A and lora_B of a UNet. diffusers"
            f" ignores such tensors, so that the factor is 1; as kohya means them it is {alpha / ranks[name]:g}",
            hint="say which is wanted: `ReadOptions(alpha_tensors='ignore')` or `ReadOptions(alpha_tensors='use')`",
        )
    if options.alpha_tensors == "ignore":
        why = "alpha tensors ignored, as asked, so alpha is r {}: 1"
        return {module: Scaling(1.0, r, float(r), why.format(r)) for module, r in ranks.items()}, []
    alphas, notes = settle_alphas(stored, ranks, options.lora_alpha, shown)
    scalings = {module: scaling_of(r, *alphas[module]) for module, r in ranks.items()}
    split = split_modules(header, {module: modules[module] for module in stored})
    return settle_split(scalings, alphas, split, options.split_qkv, header), list(notes)

"""PEFT's LoHa and LoKr: a product of two products, element by element or of Kronecker's kind, with a factor of alpha / r.

The tensors are LyCORIS's, the factor is PEFT's: its alpha and its rank stand in the configuration, and count where both sides of a
LoKr are stored whole too (PEFT, `tuners/loha/layer.py`, `tuners/lokr/layer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ....errors import AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Reshaped
from ....files.safetensors.info import TensorInfo
from ...adapter import Adapter, AdapterModule, Base
from ...source import Source
from ..diffusion.algebra import FactorPair, hadamard, kronecker
from ..diffusion.names import split_name
from ..single_file import Parts, check_floats
from .config import CONFIG_NAME, PeftConfig, config_of
from .names import sort_tensors

_PARTS = {
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
_TRAINING = (
    "rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d", "decompose_both",
    "decompose_factor",
)  # fmt: skip
"""Fields that say how such an adapter was made and trained; its tensors hold the outcome."""


def is_product(source: Source, name: str) -> bool:
    """Whether the folder of `source` holds a LoHa or LoKr of PEFT's, with its tensors in the file `name`."""
    kind = source.config(CONFIG_NAME).get("peft_type")
    parts = _PARTS.get(kind, ()) if isinstance(kind, str) else ()
    return any(split_name(each, parts) for each in source.header(name).tensors)


def load_product(source: Source, name: str) -> Adapter:
    """The LoHa or LoKr in the folder of `source`, whose tensors are in the file `name`.

    Raises `AdapterError` (or a kind of it) where tensors are missing, do not fit each other or the configuration.
    """
    path, header = source.folder / CONFIG_NAME, source.header(name)
    config = _config(source)
    parts: dict[str, dict[str, TensorInfo]] = {}
    others: dict[str, TensorInfo] = {}
    for tensor, info in header.tensors.items():
        found = split_name(tensor, _PARTS[source.config(CONFIG_NAME)["peft_type"]])
        if found is None:
            others[tensor] = info
        else:
            parts.setdefault(found[0].removeprefix("base_model.model."), {})[found[1]] = info
    rest = sort_tensors(others, config, header.path)
    if rest.modules or rest.tokens:
        odd = next(iter([*rest.modules, *rest.tokens]))
        raise AdapterError(f"{printable(str(header.path))} holds a LoRA pair or rows for {printable(odd)} beside another kind")
    modules = {module: _module(module, held, config, printable(str(header.path))) for module, held in parts.items()}
    adapter = Adapter(
        name=source.name,
        path=source.folder,
        format="peft",
        modules=modules,
        replacements=rest.replacements,
        header=header,
        sha256=source.sha256(path.name, name),
        config=config.fields,
        base_model=config.base_model,
        notes=config.notes,
        left_out=rest.left_out,
        unasked=frozenset(rest.replacements[end].name for end in rest.ends),
    )

    def on_base(base: Base) -> Adapter:
        return replace(adapter, modules={each: _fitted(module, base) for each, module in modules.items()})

    return replace(adapter, on_base=on_base)


def _config(source: Source) -> PeftConfig:
    """The fields, those of the same meaning under LoRA's names."""
    shown = source.folder / CONFIG_NAME
    fields = dict(source.config(CONFIG_NAME))
    for field in _TRAINING:
        fields.pop(field, None)
    alpha = fields.pop("alpha", 8)
    for field in ("use_rslora", "use_dora", "lora_bias", "lora_alpha", "fan_in_fan_out"):
        if fields.get(field):
            raise UnsupportedAdapterError(
                f"{printable(str(shown))}: {field} beside peft_type {printable(fields['peft_type'])}", hint="nothing was written"
            )
    return config_of({**fields, "peft_type": "LORA", "lora_alpha": alpha}, shown)


def _module(name: str, parts: Parts, config: PeftConfig, shown: str) -> AdapterModule:
    where = f"{shown}: {printable(name)}"
    check_floats(parts, where)
    built = _hadamard(parts, where) if any(part.startswith("hada") for part in parts) else _kronecker(parts, where)
    scaling = config.scaling(name, config.rank(name) if built.dim is None else built.dim)
    kind = "LoHa" if "hada_w1_a" in parts else "LoKr"
    scaling = replace(scaling, why=f"{scaling.why}, {kind}")
    return AdapterModule(name, built.lora_A, built.lora_B, scaling, product=built.product)


def _hadamard(parts: Parts, where: str) -> FactorPair:
    needed = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} | ({"hada_t1", "hada_t2"} if "hada_t1" in parts else set())
    _check_parts(parts, needed, where)
    return hadamard(parts, where)


def _kronecker(parts: Parts, where: str) -> FactorPair:
    needed = {"lokr_w1"} if "lokr_w1" in parts else {"lokr_w1_a", "lokr_w1_b"}
    needed |= {"lokr_w2"} if "lokr_w2" in parts else {"lokr_w2_a", "lokr_w2_b"} | (parts.keys() & {"lokr_t2"})
    _check_parts(parts, needed, where)
    if "lokr_w2" in parts and len(parts["lokr_w2"].shape) == 3:
        raise UnsupportedAdapterError(
            f"{where} is LoKr on a convolution of one dimension, whose numbers PEFT 0.21.2 puts where its weight has others",
            hint="nothing was written",
        )
    return kronecker(parts, where)


def _check_parts(parts: Parts, needed: set[str], where: str) -> None:
    lack, extra = sorted(needed - parts.keys()), sorted(parts.keys() - needed)
    if lack or extra:
        words = [f"no {', '.join(lack)}"] if lack else []
        words += [f"{', '.join(extra)} beside it"] if extra else []
        raise AdapterError(
            f"{where} has {', '.join(sorted(parts))}, but {' and '.join(words)}",
            hint="the file is not complete, or was put together from two; nothing was written",
        )


def _fitted(module: AdapterModule, base: Base) -> AdapterModule:
    """`module` in the dimensions of a convolution's weight, which PEFT trains flat."""
    shape = base.shape_of(module.tensor)
    inner = module.lora_A.shape[1:]
    if shape is None or len(shape) < 3 or shape[1:] == inner or math.prod(shape[1:]) != math.prod(inner):
        return module
    return replace(module, lora_A=Reshaped(module.lora_A, (module.lora_A.shape[0], *shape[1:])))


def own_names(names: Mapping[str, TensorInfo]) -> bool:
    """Whether tensors of LoHa or LoKr stand under the names that PEFT gives them: alpha is then in its configuration."""
    parts = (*_PARTS["LOHA"], *_PARTS["LOKR"])
    return any(each.startswith("base_model.model.") and split_name(each, parts) for each in names)

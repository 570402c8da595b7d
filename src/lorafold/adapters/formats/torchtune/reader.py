"""torchtune's own checkpoint: `adapter_model.pt`, in torchtune's names, with the rows of queries and keys in Meta's order.

Beside it lies an `adapter_config.json` in PEFT's words, of which rank and alpha count. How many heads there are is the base's to
say, and whether the rows are in Meta's order at all, which they are for some families only (torchtune, `models/convert_weights.py`
and those of the families).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ....files.safetensors.info import Header
from ....kernel.update import scaling_factor
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...source import Source
from ..rotary import to_halves
from ..single_file import Parts, both, gather, magnitude, straight

WEIGHTS_NAME = "adapter_model.pt"
CONFIG_NAME = "adapter_config.json"

NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""Modules of a layer, and what transformers calls them."""

META_ORDER = ("llama", "mistral", "gemma", "gemma2")
"""Families whose queries and keys torchtune has in Meta's order."""

SAME_ORDER = ("qwen2", "qwen3", "phi3")
"""Families that it has in transformers' order."""

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_PARTS = {"lora_a.weight": "lora_a", "lora_b.weight": "lora_b", "magnitude": "magnitude"}
_EXPERTS = {
    f"lora_{projection}_{side}": "torchtune's experts, whose layout is not known here"
    for projection in ("gate", "up", "down")
    for side in "ab"
}


def is_torchtune(source: Source) -> bool:
    """Whether torchtune's file is there, or one file with its names."""
    if source.find(WEIGHTS_NAME) is not None:
        return source.file is not None or "adapter_model.safetensors" not in source.names
    name = source.find("*.pt") if source.file is not None else None
    return name is not None and any(each.endswith((".lora_a.weight", ".lora_gate_a")) for each in source.header(name).tensors)


def load_torchtune(source: Source) -> Adapter:
    """The adapter in `source`.

    Raises `AdapterError` (or a kind of it) where tensors and configuration contradict each other, or a module is not known.
    """
    weights = source.find(WEIGHTS_NAME, "*.pt")
    if weights is None:
        raise AdapterError(f"{source.shown} holds no {WEIGHTS_NAME}")
    header = source.header(weights)
    rank, alpha, said = _rank_and_alpha(source)
    modules = {}
    for name, parts in gather(header, _PARTS, _EXPERTS).items():
        module = _module(name, parts, rank, alpha, said, header)
        modules[module.name] = module
    beside = [CONFIG_NAME] if CONFIG_NAME in source.names else []
    adapter = Adapter(
        name=source.name,
        path=source.path,
        format="torchtune",
        modules=modules,
        replacements={},
        header=header,
        sha256=source.sha256(*beside, weights),
        config=source.config(CONFIG_NAME) if beside else {},
        notes=("the rows of queries and keys are in the order that the base's family has in torchtune",),
    )
    return replace(adapter, on_base=lambda base: _on_base(adapter, base))


def _rank_and_alpha(source: Source) -> tuple[int | None, float, str]:
    shown = printable(str(source.folder / CONFIG_NAME))
    fields = source.config(CONFIG_NAME) if CONFIG_NAME in source.names else {}
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float):
        if not fields and source.options.lora_alpha is not None:
            return None, float(source.options.lora_alpha), " as given"
        raise AdapterConfigError(
            f"{shown} does not say r and lora_alpha", hint="give the alpha that it was trained with: `ReadOptions(lora_alpha=16)`"
        )
    if fields.get("use_rslora") or fields.get("rank_pattern") or fields.get("alpha_pattern"):
        raise UnsupportedAdapterError(f"{shown} asks for rsLoRA or patterns, which torchtune does not have")
    return rank, float(str(alpha)), ""


def _module(name: str, parts: Parts, rank: int | None, alpha: float, said: str, header: Header) -> AdapterModule:
    A, B, shown = both(name, parts, "lora_a", "lora_b", header)
    r = straight(A, B, shown)
    if rank is not None and r != rank:
        raise AdapterConfigError(f"{shown} has rank {r}, but {CONFIG_NAME} says {rank}")
    found = _LAYER.fullmatch(name)
    if name == "output":
        plain = "lm_head"
    elif found is not None and found[2] in NAMES:
        plain = f"model.layers.{found[1]}.{NAMES[found[2]]}"
    else:
        raise UnsupportedAdapterError(
            f"{shown} is a module of torchtune that is not known: expected output, or layers.N. and one of {', '.join(NAMES)}",
            hint="torchtune also writes adapter_model.safetensors, in PEFT's format",
        )
    scaling = Scaling(scaling_factor(r, alpha), r, alpha, f"lora_alpha {alpha:g}{said} / r {r}")
    return AdapterModule(plain, A, B, scaling, magnitude=magnitude(parts, "magnitude", B.shape[0], shown))


def _on_base(adapter: Adapter, base: Base) -> Adapter:
    names = [name for name in adapter.modules if name.endswith(("q_proj", "k_proj"))]
    family = base.model_type
    if not names or family in SAME_ORDER:
        return replace(adapter, notes=())
    if family not in META_ORDER:
        raise UnsupportedAdapterError(
            f"{printable(str(adapter.path))} has rows of queries and keys in torchtune's order, which is not known for a base of"
            f" model_type '{printable(family)}': known are {', '.join((*META_ORDER, *SAME_ORDER))}",
            hint="torchtune also writes adapter_model.safetensors, in PEFT's format and transformers' order",
        )
    return replace(adapter, modules=in_halves(adapter, base), notes=("rows of queries and keys put in transformers' order",))


def in_halves(adapter: Adapter, base: Base) -> Mapping[str, AdapterModule]:
    """The modules of `adapter`, the rows of queries and keys put in transformers' order.

    Raises `AdapterError` where the base's heads do not divide them.
    """
    queries, keys = base.heads(adapter)
    modules = dict(adapter.modules)
    for name, module in modules.items():
        if not name.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            continue
        heads, rows = queries if name.endswith("q_proj") else keys, module.lora_B.shape[0]
        if rows % (2 * heads):
            raise AdapterError(
                f"{printable(str(adapter.path))}: {printable(name)} has {rows} rows, which {heads} heads do not divide",
                hint="nothing was written; check that the adapter was trained on this base model",
            )
        scaled = None if module.magnitude is None else to_halves(module.magnitude, heads)
        modules[name] = replace(module, lora_B=to_halves(module.lora_B, heads), magnitude=scaled)
    return modules

"""litgpt's `lit_model.pth.lora`: LLaMA's modules in litgpt's names, queries, keys and values in one pair.

Of `attn.qkv`, lora_A holds a group of r rows for each of query, key and value that was trained, and lora_B their rows one after
the other (litgpt, `lora.py`, `LoRAQKVLinear`). How many rows are whose is told by the base's shapes; which were trained, and alpha,
by `hyperparameters.yaml`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ....errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Cut
from ....files.regular import read_regular
from ....files.safetensors.info import Header
from ....kernel.update import scaling_factor
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...source import Source
from ..single_file import Parts, both, check_shape, gather, straight

WEIGHTS_NAME = "lit_model.pth.lora"
CONFIG_NAME = "hyperparameters.yaml"

NAMES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
"""Modules of a layer of the LLaMA kind, and what transformers calls them."""

_FIELDS = {
    "lora_r": r"[0-9]{1,6}",
    "lora_alpha": r"[0-9.]{1,12}",
    "lora_query": r"true|false",
    "lora_key": r"true|false",
    "lora_value": r"true|false",
}
_TRAINED = {"lora_query": "q_proj", "lora_key": "k_proj", "lora_value": "v_proj"}
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_OLD = "attn.attn"


def is_litgpt(source: Source) -> bool:
    """Whether litgpt's file is there, or one file with its names."""
    if source.find(WEIGHTS_NAME) is not None:
        return True
    name = source.find("*.lora", "*.pth", "*.pt") if source.file is not None else None
    return name is not None and any(".attn.qkv.lora_" in each for each in source.header(name).tensors)


def load_litgpt(source: Source) -> Adapter:
    """The adapter in `source`; `hyperparameters.yaml` lies beside it.

    Raises `AdapterError` (or a kind of it) where tensors and configuration contradict each other, or a module is not known.
    """
    weights = source.find(WEIGHTS_NAME, "*.lora", "*.pth", "*.pt")
    if weights is None:
        raise AdapterError(f"{source.shown} holds no {WEIGHTS_NAME}")
    if CONFIG_NAME not in source.names:
        raise AdapterConfigError(
            f"{source.shown} holds no {CONFIG_NAME}, which says lora_r, lora_alpha and what was trained",
            hint="copy it to the folder of the adapter; litgpt writes it beside the checkpoint",
        )
    fields = _read_fields(source)
    header = source.header(weights)
    modules = {}
    for name, parts in gather(header, {"lora_A": "lora_A", "lora_B": "lora_B"}, {}).items():
        module = _module(name, parts, fields, header)
        modules[module.name] = module
    adapter = Adapter(
        name=source.name,
        path=source.path,
        format="litgpt",
        modules=modules,
        replacements={},
        header=header,
        sha256=source.sha256(CONFIG_NAME, weights),
        config=fields,
        notes=("queries, keys and values are one module until the base's shapes tell them apart",),
    )
    return replace(adapter, on_base=lambda base: _on_base(adapter, base))


def _read_fields(source: Source) -> dict[str, str]:
    """The fields that matter, as text; they stand at the beginning of lines, and no YAML beyond that is read."""
    path = source.folder / CONFIG_NAME
    shown = printable(str(path))
    try:
        lines = read_regular(path, 1 << 20, error=AdapterConfigError).decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise AdapterConfigError(f"{shown} is not UTF-8 text") from None
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name not in _FIELDS:
            continue
        value = value.partition(" #")[0].strip()
        if name in fields or not re.fullmatch(_FIELDS[name], value):
            raise AdapterConfigError(f"{shown}: {name} stands twice, or is not what it must be: '{printable(value)[:40]}'")
        fields[name] = value
    for name in _FIELDS:
        if name not in fields:
            raise AdapterConfigError(f"{shown} does not say {name}")
    return fields


def _module(name: str, parts: Parts, fields: dict[str, str], header: Header) -> AdapterModule:
    A, B, shown = both(name, parts, "lora_A", "lora_B", header)
    rank = int(fields["lora_r"])
    found = _LAYER.fullmatch(name)
    inner = found[2] if found else ""
    if inner == _OLD:
        raise UnsupportedAdapterError(
            f"{shown} was saved by a litgpt that interleaved queries, keys and values",
            hint="nothing was written; merge it with that litgpt (litgpt merge_lora), and use its output",
        )
    if inner == "attn.qkv":
        trained = sum(fields[field] == "true" for field in _TRAINED)
        fits = len(A.shape) == len(B.shape) == 2 and A.shape[0] == rank * trained and B.shape[1] == rank
        check_shape(
            A, f"({trained} · r {rank}, in), with '{printable(B.name)}' (rows, {rank}), found {list(B.shape)},", fits, shown
        )
    elif straight(A, B, shown) != rank:
        raise AdapterConfigError(f"{shown} has rank {A.shape[0]}, but {CONFIG_NAME} says lora_r {rank}")
    if name == "lm_head":
        plain = name
    elif found is not None and inner in NAMES:
        plain = f"model.layers.{found[1]}.{NAMES[inner]}"
    elif found is not None and inner == "attn.qkv":
        plain = f"model.layers.{found[1]}.self_attn.qkv"
    else:
        raise UnsupportedAdapterError(
            f"{shown} is a module of litgpt that is not known: expected lm_head, or transformer.h.N. and one of attn.qkv,"
            f" {', '.join(NAMES)}",
            hint="nothing was written; merge it with litgpt (litgpt merge_lora)",
        )
    alpha = _number(fields["lora_alpha"], shown)
    return AdapterModule(plain, A, B, Scaling(scaling_factor(rank, alpha), rank, alpha, f"lora_alpha {alpha:g} / r {rank}"))


def _number(text: str, shown: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise AdapterConfigError(f"{shown}: lora_alpha in {CONFIG_NAME} must be a number, not '{text}'") from None


def _on_base(adapter: Adapter, base: Base) -> Adapter:
    """Queries, keys and values as modules of their own, each with as many rows as the base's has."""
    modules: dict[str, AdapterModule] = {}
    for name, module in adapter.modules.items():
        attention, _, last = name.rpartition(".")
        if last != "qkv":
            modules[name] = module
            continue
        shown = f"{printable(str(adapter.path))}: {printable(name)}"
        row, r = 0, module.scaling.r
        for group, projection in enumerate(each for field, each in _TRAINED.items() if adapter.config[field] == "true"):
            shape = base.shape_of(f"{attention}.{projection}.weight")
            if shape is None:
                raise UnsupportedAdapterError(
                    f"{shown} is for queries, keys and values of a base that has no {printable(attention)}.{projection}.weight",
                    hint="nothing was written; merge it with litgpt (litgpt merge_lora)",
                )
            rows = shape[0]
            A = Cut(module.lora_A, 0, group * r, (group + 1) * r)
            B = Cut(module.lora_B, 0, row, min(row + rows, module.lora_B.shape[0]))
            part = f"{attention}.{projection}"
            modules[part] = AdapterModule(part, A, B, replace(module.scaling, why=f"{module.scaling.why}, its part of qkv"))
            row += rows
        if row != module.lora_B.shape[0]:
            raise AdapterError(
                f"{shown} has {module.lora_B.shape[0]} rows, but what was trained of the base's queries, keys and values has {row}",
                hint="nothing was written; check that the adapter was trained on this base model",
            )
    return replace(adapter, modules=modules, notes=())

"""llama.cpp's adapters: one GGUF file, `<tensor>.lora_a` and `<tensor>.lora_b` in llama.cpp's names.

The factor is `adapter.lora.alpha` / rank, or 1 where that is 0 or missing. The rows of lora_b lie as those of the base's weight do
in GGUF: for some architectures that is another order than transformers', and the base must say how many heads there are. lora_a of
token_embd is (tokens, r) (llama.cpp, `convert_lora_to_gguf.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from ....errors import AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Matrix, Permuted
from ....files.safetensors.info import Header
from ....kernel.update import scaling_factor
from ...adapter import Adapter, AdapterModule, Base, Scaling
from ...source import Source
from ..single_file import Parts, both, check_shape, gather, straight
from ..torchtune.reader import in_halves
from .names import ARCHITECTURES, LAYOUTS, PAIRED, module_of

_PARTS = {"weight.lora_a": "lora_a", "weight.lora_b": "lora_b"}


def is_gguf(source: Source) -> bool:
    """Whether a file of that ending was given; in a folder it may be a base model."""
    return source.file is not None and source.find("*.gguf") is not None


def load_gguf(source: Source) -> Adapter:
    """The adapter in the one GGUF file of `source`.

    Raises `AdapterError` (or a kind of it) where it holds no LoRA adapter, or a tensor that is not known.
    """
    name = source.find("*.gguf")
    if name is None:
        raise AdapterError(f"{source.shown} holds no .gguf file, or several", hint="give the path of the file")
    header = source.header(name)
    shown = printable(str(header.path))
    kind, what = header.metadata.get("general.type", "model"), header.metadata.get("adapter.type", "")
    if kind != "adapter" or what != "lora":
        raise AdapterError(
            f"{shown} is not a LoRA adapter: general.type is '{printable(kind)}', adapter.type '{printable(what)}'",
            hint="expected 'adapter' and 'lora'; a base model in GGUF cannot be merged into",
        )
    for key in header.metadata:
        if key.startswith("adapter.alora."):
            raise UnsupportedAdapterError(f"{shown}: {printable(key)}: aLoRA acts on some tokens only, so no weight can hold it")
    architecture = header.metadata.get("general.architecture", "")
    if architecture not in LAYOUTS:
        raise UnsupportedAdapterError(
            f"{shown} is for the architecture '{printable(architecture)}', whose names are not known: known are"
            f" {', '.join(LAYOUTS)}",
            hint="convert the adapter in PEFT's format instead",
        )
    alpha = _alpha(header, shown)
    modules = {}
    for tensor, parts in gather(header, _PARTS, {}).items():
        module = _module(tensor, parts, architecture, alpha, header)
        modules[module.name] = module
    adapter = Adapter(
        name=header.metadata.get("general.name", "") or source.name,
        path=source.path,
        format="gguf",
        modules=modules,
        replacements={},
        header=header,
        sha256=source.sha256(name),
        config=dict(header.metadata),
        base_model=header.metadata.get("general.base_model.0.name"),
    )
    if architecture not in PAIRED or not any(each.endswith(("q_proj", "k_proj")) for each in modules):
        return adapter
    note = "the rows of queries and keys are in llama.cpp's order until the base's heads are known"
    return replace(adapter, notes=(note,), on_base=lambda base: _on_base(adapter, base))


def _alpha(header: Header, shown: str) -> float:
    text = header.metadata.get("adapter.lora.alpha", "0")
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise AdapterError(f"{shown}: adapter.lora.alpha must be a finite number, not {printable(text)[:40]}")
    return alpha


def _module(name: str, parts: Parts, architecture: str, alpha: float, header: Header) -> AdapterModule:
    a, b, shown = both(name, parts, "lora_a", "lora_b", header)
    module = module_of(name, architecture)
    if module is None:
        raise UnsupportedAdapterError(
            f"{shown} is a tensor of the architecture '{architecture}' that is not known", hint="nothing was written"
        )
    embedding = name == "token_embd"
    if embedding:
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1] > 0
        check_shape(b, f"(dims, r) beside '{printable(a.name)}' (tokens, r) {list(a.shape)}", fits, shown)
        lora_A: Matrix = Permuted(a)
        r = a.shape[1]
    else:
        lora_A, r = a, straight(a, b, shown)
    if alpha == 0:
        scaling = Scaling(1.0, r, float(r), "adapter.lora.alpha is 0 or missing: 1")
    else:
        scaling = Scaling(scaling_factor(r, alpha), r, alpha, f"adapter.lora.alpha {alpha:g} / r {r}")
    return AdapterModule(module, lora_A, b, scaling, embedding=embedding)


def _on_base(adapter: Adapter, base: Base) -> Adapter:
    meant, found = adapter.config["general.architecture"], ARCHITECTURES.get(base.model_type)
    if found is not None and found != meant:
        raise AdapterError(
            f"{printable(str(adapter.path))} is for the architecture '{meant}', and the base is '{found}'"
            f" (model_type '{printable(base.model_type)}'), whose rows are in another order",
            hint="nothing was written; check that the adapter was trained on this base model",
        )
    note = "rows of queries and keys put in transformers' order"
    return replace(adapter, modules=in_halves(adapter, base), notes=(note,))

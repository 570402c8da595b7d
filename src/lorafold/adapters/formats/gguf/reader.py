"""llama.cpp's adapters: one GGUF file, `<tensor>.lora_a` and `<tensor>.lora_b` in llama.cpp's names.

The factor is `adapter.lora.alpha` / rank, or 1 where that is 0 or missing. The rows of lora_b lie as those of the base's weight do
in GGUF: for some architectures that is another order than transformers', and the base must say how many heads there are. lora_a of
token_embd is (tokens, r); experts are in stacks, as their weights are (llama.cpp, `convert_lora_to_gguf.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ....errors import AdapterError, UnsupportedAdapterError, printable
from ....files.expression import Matrix, Permuted, Reshaped, narrow
from ....files.safetensors.info import Header, TensorInfo
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


def is_gguf_model(source: Source) -> bool:
    """Whether a GGUF file was given that says that it is a model, or says nothing, as older ones do."""
    name = source.find("*.gguf") if source.file is not None else None
    return name is not None and source.header(name).metadata.get("general.type", "model") == "model"


def load_gguf(source: Source) -> Adapter:
    """The adapter in the one GGUF file of `source`; its modules are called as transformers calls them, where that is known.

    Raises `AdapterError` (or a kind of it) where it holds no LoRA adapter.
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
            hint="expected 'adapter' and 'lora'; a base model comes first, adapters after",
        )
    for key in header.metadata:
        if key.startswith("adapter.alora."):
            raise UnsupportedAdapterError(f"{shown}: {printable(key)}: aLoRA acts on some tokens only, so no weight can hold it")
    adapter = Adapter(
        name=header.metadata.get("general.name", "") or source.name,
        path=source.path,
        format="gguf",
        modules=modules_in_gguf(header),
        replacements={},
        header=header,
        sha256=source.sha256(name),
        config=dict(header.metadata),
        base_model=header.metadata.get("general.base_model.0.name"),
    )
    architecture = header.metadata.get("general.architecture", "")
    called = {own: module_of(own, architecture) if architecture in LAYOUTS else None for own in adapter.modules}
    unknown = next((own for own, module in called.items() if module is None), None)
    if unknown is not None:
        return replace(adapter, on_base=lambda base: _in_the_same_names(adapter, unknown, base))
    modules = {str(called[own]): replace(module, name=str(called[own]), tensor="") for own, module in adapter.modules.items()}
    adapter = replace(adapter, modules=modules)
    if architecture not in PAIRED or not any(each.endswith(("q_proj", "k_proj")) for each in modules):
        return adapter
    note = "the rows of queries and keys are in llama.cpp's order until the base's heads are known"
    return replace(adapter, notes=(note,), on_base=lambda base: _on_base(adapter, base))


def modules_in_gguf(header: Header) -> dict[str, AdapterModule]:
    """The modules of the adapter with this `header` as the file has them: names, rows and stacks of experts are llama.cpp's.

    Raises `AdapterError` where its tensors contradict each other, `UnsupportedAdapterError` for quantised ones.
    """
    for info in header.tensors.values():
        if info.torch_dtype is None or not info.torch_dtype.is_floating_point:
            raise UnsupportedAdapterError(
                f"{printable(str(header.path))}: tensor '{printable(info.name)}' is of type {info.dtype}, expected F32, F16 or"
                " BF16",
                hint="quantised factors have lost what a merge needs; convert the adapter with outtype f32",
            )
    alpha = _alpha(header)
    modules: dict[str, AdapterModule] = {}
    for name, parts in gather(header, _PARTS, {}).items():
        modules |= _modules(name, parts, alpha, header)
    return modules


def _alpha(header: Header) -> float:
    text = header.metadata.get("adapter.lora.alpha", "0")
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise AdapterError(f"{printable(str(header.path))}: adapter.lora.alpha must be a finite number, not {printable(text)[:40]}")
    return alpha


def _modules(name: str, parts: Parts, alpha: float, header: Header) -> Mapping[str, AdapterModule]:
    """The module `name`, or those of the experts in its stack."""
    a, b, shown = both(name, parts, "lora_a", "lora_b", header)
    if len(a.shape) == 3:
        fits = len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2] > 0
        check_shape(b, f"(experts, out, r) beside '{printable(a.name)}' (experts, r, in) {list(a.shape)}", fits, shown)
        scaling = _scaling(a.shape[1], alpha)
        return {
            f"{name}[{i}]": AdapterModule(
                f"{name}[{i}]", _expert(a, i), _expert(b, i), scaling, tensor=f"{name}.weight", index=i, exchanged=True
            )
            for i in range(a.shape[0])
        }
    if name == "token_embd":
        fits = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1] > 0
        check_shape(b, f"(dims, r) beside '{printable(a.name)}' (tokens, r) {list(a.shape)}", fits, shown)
        return {name: AdapterModule(name, Permuted(a), b, _scaling(a.shape[1], alpha), embedding=True)}
    return {name: AdapterModule(name, a, b, _scaling(straight(a, b, shown), alpha))}


def _expert(stack: TensorInfo, index: int) -> Matrix:
    return Reshaped(narrow(stack, 0, index, 1), stack.shape[1:]).settled()


def _scaling(r: int, alpha: float) -> Scaling:
    if alpha == 0:
        return Scaling(1.0, r, float(r), "adapter.lora.alpha is 0 or missing: 1")
    return Scaling(scaling_factor(r, alpha), r, alpha, f"adapter.lora.alpha {alpha:g} / r {r}")


def _in_the_same_names(adapter: Adapter, unknown: str, base: Base) -> Adapter:
    """`adapter` on a base that is in GGUF as well."""
    if all(module.tensor in base.shapes for module in adapter.modules.values()):
        return adapter
    architecture, shown = printable(adapter.config.get("general.architecture", "")), printable(str(adapter.path))
    what = (
        f"{shown} is for the architecture '{architecture}', whose names are not known: known are {', '.join(LAYOUTS)}"
        if architecture not in LAYOUTS
        else f"{shown}: {printable(unknown)} is a tensor of the architecture '{architecture}' that is not known"
    )
    raise UnsupportedAdapterError(
        what, hint="nothing was written; merge into the base in GGUF, or give the adapter in PEFT's format"
    )


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

"""What an adapter or a checkpoint is, explained: the value behind ``lorafold inspect``."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter, on_base
from ..adapters.load import is_adapter, load_adapter
from ..adapters.numbers import AdapterReader, check_numbers
from ..adapters.read_options import ReadOptions
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.quantised import refusal
from ..checkpoints.receipt import receipt_of
from ..errors import AdapterError, printable
from ..kernel.update import LowRankUpdate
from ..planning.names.gguf_names import told_of
from ..planning.summary import kind_of
from ..text import Readable, Summary, Table, plural, size
from .verbs import tells


@dataclass(frozen=True)
class Inspection(Readable):
    """What an adapter or a checkpoint is.

    - `kind`: ``"adapter"`` or ``"checkpoint"``; `name`: what it is called
    - `details`: what is known of it, as JSON has it: of an adapter `format`, `base_model`, `sha256`, `bytes`, `modules`,
      `replacements`, `rows`, `norm` and `notes`; of a checkpoint `model_type`, `parameters`, `parameters_by_dtype`, `bytes`,
      `files`, `tensors` and `receipt`; of one that is quantised `quantisation`, `encoded` and `refused` too

    >>> import lorafold
    >>> found = lorafold.inspect("adapter")
    >>> found.kind, found.details["modules"]["model.layers.0.q_proj"]["scaling"]
    ('adapter', 2.0)
    >>> print(found)
    adapter, a LoRA adapter in the format peft
      base      org/tiny
      holds     4 modules, 0 replaced tensors, ...
      ‖ΔW‖      ... in all
       modules                ΔW      dtype  r  scaling  why                 ...‖ΔW‖
    2  model.layers.*.q_proj  [8, 8]  F32    2        2  lora_alpha 4 / r 2  ... to ...
    2  model.layers.*.v_proj  [8, 8]  F32    2        2  lora_alpha 4 / r 2  ... to ...
    """

    kind: Literal["adapter", "checkpoint"]
    name: str
    details: Mapping[str, Any]

    def summary(self, *, everything: bool = False) -> Summary:
        """What it is, for people: grouped by kind of module, or with `everything` tensor by tensor."""
        summary = adapter_summary if self.kind == "adapter" else checkpoint_summary
        return summary(self.name, self.details, everything=everything)

    def to_json(self) -> dict[str, Any]:
        """The inspection as a JSON object."""
        return {"kind": self.kind, "name": self.name, **self.details}


@tells
def inspect(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, read_options: ReadOptions | None = None
) -> Inspection:
    """What the adapter or the checkpoint at `path` is: of an adapter modules, ranks, scalings and why, norms; of a checkpoint its
    tensors, dtypes, files, and what was merged into it.

    - `base`: the model that an adapter is put on, where its files leave something to that
    - `read_options`: what the files of an adapter cannot tell

    Raises as `load_adapter` and `open_checkpoint` do; `NonFiniteError` for an adapter with damaged numbers.

    >>> import lorafold
    >>> lorafold.inspect("base").details["parameters_by_dtype"]
    {'BF16': ...}
    """
    found = Path(path)
    if is_adapter(found, read_options):
        adapter = _on(load_adapter(found, read_options), None if base is None else Path(base))
        return Inspection("adapter", adapter.name, _adapter(adapter))
    checkpoint = open_checkpoint(found)
    return Inspection("checkpoint", checkpoint.name, _checkpoint(checkpoint))


def _on(adapter: Adapter, base: Path | None) -> Adapter:
    """`adapter` as it is on `base`; without that, where its updates can be told already, as it is."""
    if base is not None:
        checkpoint = open_checkpoint(base)
        return on_base(adapter, told_of(checkpoint))
    if any(module.lora_A.shape[0] != module.lora_B.shape[1] for module in adapter.modules.values()):
        raise AdapterError(
            f"{printable(str(adapter.path))} leaves to the base what its {adapter.format} files do not say",
            hint="give the base: `base=BASE`",
        )
    return adapter


def _adapter(adapter: Adapter) -> dict[str, Any]:
    check_numbers(adapter)
    modules: dict[str, dict[str, Any]] = {}
    with AdapterReader(adapter) as reader:
        for name, module in adapter.modules.items():
            update = reader.update(module)
            modules[name] = {
                "r": module.scaling.r,
                "lora_alpha": module.scaling.lora_alpha,
                "scaling": module.scaling.value,
                "why": module.scaling.why,
                "shape": list(update.shape),
                "dtype": module.lora_A.dtype,
                "embedding": module.embedding,
                "lora_bias": module.lora_bias is not None,
                "dora": module.magnitude is not None,
                "tensor": module.tensor,
                "index": module.index,
                "norm": frobenius(update),
            }
    return {
        "format": adapter.format,
        "base_model": adapter.base_model,
        "sha256": adapter.sha256,
        "bytes": adapter.header.file_size,
        "modules": modules,
        "replacements": {name: {"shape": list(info.shape), "dtype": info.dtype} for name, info in adapter.replacements.items()},
        "rows": {name: list(rows.indices) for name, rows in adapter.rows.items()},
        "norm": math.hypot(*(module["norm"] for module in modules.values())),
        "notes": list(adapter.notes),
    }


def frobenius(update: LowRankUpdate) -> float:
    """‖ΔW‖, from the r × r Gram matrices of the factors: ‖sBA‖² = s² Σ (BᵀB) ∘ (AAᵀ).

    >>> import torch
    >>> frobenius(LowRankUpdate(torch.ones(1, 4), torch.ones(4, 1), 0.5))
    2.0
    """
    A, B = update.lora_A.double(), update.lora_B.double()
    square = float(((B.T @ B) * (A @ A.T)).sum())
    return float(abs(update.scaling) * max(square, 0.0) ** 0.5)


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    receipt = receipt_of(checkpoint)
    config, gguf = checkpoint.config or {}, checkpoint.gguf
    dtypes: Counter[str] = Counter()
    encoded = checkpoint.encoded
    kinds = {name: encoded[name].encoding if name in encoded else info.dtype for name, info in checkpoint.tensors.items()}
    for name, info in checkpoint.tensors.items():
        dtypes[kinds[name]] += info.numel
    return {
        "model_type": config.get("model_type") if gguf is None else gguf.metadata.get("general.architecture"),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "parameters_by_dtype": dict(dtypes),
        "bytes": checkpoint.nbytes,
        "files": {shard.name: shard.header.file_size for shard in checkpoint.shards},
        "tensors": {
            name: {"shape": list(info.shape), "dtype": kinds[name], "file": checkpoint.file_of(info).name}
            | ({"stored": list(encoded[name].stored)} if name in encoded else {})
            for name, info in checkpoint.tensors.items()
        },
        **_quantisation(checkpoint),
        "receipt": None if receipt is None else {key: value for key, value in asdict(receipt).items() if key != "tensors"},
    }


def _quantisation(checkpoint: Checkpoint) -> dict[str, Any]:
    """How it is quantised: what its configuration says, and why it cannot be decoded, if so; nothing for one that is not."""
    found = checkpoint.quantisation
    if found is None and not checkpoint.encoded:
        return {}
    said = None if found is None else {"method": found.method, "file": found.file}
    return {"quantisation": said, "refused": refusal(checkpoint), "encoded": len(checkpoint.encoded)}


def _quantised_words(checkpoint: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "quantisation" not in checkpoint:
        return []
    said, count = checkpoint["quantisation"], checkpoint["encoded"]
    words = "no configuration says so" if said is None else f"{printable(said['file'])} says {printable(said['method'])}"
    refused = [("refused", checkpoint["refused"])] if checkpoint["refused"] else []
    return [("quantised", f"{plural(count, 'weight')} that can be decoded; {words}"), *refused]


def adapter_summary(name: str, adapter: Mapping[str, Any], *, everything: bool) -> Summary:
    """Of an adapter: equal modules together, or with `everything` each by itself."""
    modules: Mapping[str, Any] = adapter["modules"]
    replaced = plural(len(adapter["replacements"]), "replaced tensor")
    facts = [
        ("base", printable(adapter["base_model"]) if adapter["base_model"] else "not stated"),
        ("holds", f"{plural(len(modules), 'module')}, {replaced}, {size(adapter['bytes'])}"),
        ("‖ΔW‖", f"{adapter['norm']:.6g} in all"),
    ]
    after = [
        *(("replaces", f"{printable(each)} {info['shape']} {info['dtype']}") for each, info in adapter["replacements"].items()),
        *(("rows", f"{len(indices)} of {printable(each)}") for each, indices in adapter["rows"].items()),
        *(("note", note) for note in adapter["notes"]),
    ]
    table = _modules(modules) if everything else _kinds_of_modules(modules)
    return Summary(f"{printable(name)}, a LoRA adapter in the format {adapter['format']}", facts, table, after)


def checkpoint_summary(name: str, checkpoint: Mapping[str, Any], *, everything: bool) -> Summary:
    """Of a checkpoint; with `everything` its tensors too."""
    kind = f", a {printable(str(checkpoint['model_type']))} model" if checkpoint["model_type"] else ", a checkpoint"
    dtypes = ", ".join(f"{count:,} {printable(dtype)}" for dtype, count in checkpoint["parameters_by_dtype"].items())
    holds = f"{plural(len(checkpoint['tensors']), 'tensor')}, {dtypes} parameters, {size(checkpoint['bytes'])}"
    facts = [
        ("holds", holds),
        *_quantised_words(checkpoint),
        *(("file", f"{printable(file)}, {size(count)}") for file, count in checkpoint["files"].items()),
        *(("merged", _merged(each)) for each in (checkpoint["receipt"] or {"adapters": ()})["adapters"]),
    ]
    rows = [(each, str(t["shape"]), t["dtype"], t["file"]) for each, t in checkpoint["tensors"].items()]
    return Summary(printable(name) + kind, facts, Table(("tensor", "shape", "dtype", "file"), rows) if everything else None)


def _merged(adapter: Mapping[str, Any]) -> str:
    return f"{printable(adapter['name'])} at weight {adapter['adapter_weight']:g}, {printable(adapter['sha256'][:12])}…"


def _modules(modules: Mapping[str, Any]) -> Table:
    rows = [(name, *_scaling(module), f"{module['norm']:.4g}") for name, module in modules.items()]
    return Table(("module", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (3, 4, 6))


def _kinds_of_modules(modules: Mapping[str, Any]) -> Table:
    groups: dict[tuple[str, ...], list[float]] = {}
    for name, module in modules.items():
        groups.setdefault((kind_of(name), *_scaling(module)), []).append(module["norm"])
    rows = [(str(len(norms)), *row, _range(norms)) for row, norms in groups.items()]
    return Table(("", "modules", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (0, 4, 5, 7))


def _scaling(module: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(module["shape"]),
        module["dtype"],
        str(module["r"]),
        f"{module['scaling']:.6g}",
        module["why"] + (", then DoRA" if module["dora"] else ""),
    )


def _range(norms: Sequence[float]) -> str:
    low, high = f"{min(norms):.4g}", f"{max(norms):.4g}"
    return low if low == high else f"{low} to {high}"

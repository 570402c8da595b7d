"""What an adapter or a checkpoint is, explained: the value behind ``lorafold inspect``."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, Base, on_base
from ..adapters.load import is_adapter, load_adapter
from ..adapters.options import ReadOptions
from ..adapters.reader import AdapterReader, check_numbers
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.open import open_checkpoint
from ..checkpoints.receipt import read_receipt
from ..errors import AdapterError, printable
from ..kernel.update import LowRankUpdate
from ..planning.names.offers import shapes_of


def inspect_path(path: Path, options: ReadOptions | None = None, base: Path | None = None) -> dict[str, Any]:
    """A JSON object with ``kind`` ``"adapter"`` or ``"checkpoint"``, and what is known of it.

    `options` are for an adapter, and so is `base`, the model that it is put on, where its files leave something to that.

    Raises as `load_adapter` and `open_checkpoint` do; `NonFiniteError` for an adapter with damaged numbers.
    """
    if is_adapter(path, options):
        return _adapter(_on(load_adapter(path, options), base))
    return _checkpoint(open_checkpoint(path))


def _on(adapter: Adapter, base: Path | None) -> Adapter:
    """`adapter` as it is on `base`; without that, where its updates can be told already, as it is."""
    if base is not None:
        checkpoint = open_checkpoint(base)
        return on_base(adapter, Base(checkpoint.config or {}, shapes_of(checkpoint)))
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
        "kind": "adapter",
        "name": adapter.name,
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
    receipt = None if checkpoint.lone else read_receipt(checkpoint.root)
    config = checkpoint.config or {}
    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        dtypes[info.dtype] += info.numel
    return {
        "kind": "checkpoint",
        "name": checkpoint.name,
        "model_type": config.get("model_type"),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "parameters_by_dtype": dict(dtypes),
        "bytes": checkpoint.nbytes,
        "files": {shard.name: shard.header.file_size for shard in checkpoint.shards},
        "tensors": {
            name: {"shape": list(info.shape), "dtype": info.dtype, "file": info.path.name}
            for name, info in checkpoint.tensors.items()
        },
        "receipt": None if receipt is None else {key: value for key, value in asdict(receipt).items() if key != "tensors"},
    }

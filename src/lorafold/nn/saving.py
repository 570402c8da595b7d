"""An adapter written to a directory that PEFT, and everything that reads PEFT's adapters, can load."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import LayerError, OutputError
from .foreign import own_layers
from .layers.adapted import OWN
from .layers.conv import ConvLoRA
from .layers.embedding import Embedding
from .layers.linear import Linear, MergedLinear
from .layers.lora_layer import Branch
from .layers.mergeable import Mergeable
from .select import plain_name


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    adapter: str = OWN,
    task_type: str | None = None,
) -> Path:
    """Write one adapter of `model` as ``adapter_config.json`` and ``adapter_model.safetensors`` into `path`, and return that.

    - `base_model`: the name or path of the base model, for the configuration
    - `adapter`: the name of the adapter, by default the layers' own
    - `task_type`: PEFT's, ``"CAUSAL_LM"`` say; None leaves it open

    A `MergedLinear` is written as the one update of its whole weight that it is, with rank r times the enabled blocks. The
    model is not changed, merged or not.

    Raises `LayerError` where no layer has the adapter or PEFT's format has no place for it (convolutions whose update is not a
    smaller convolution), and `OutputError` where `path` cannot be written.
    """
    layers = {
        plain_name(name): layer for name, layer in own_layers(model, "save_adapter").items() if adapter in layer.adapter_names
    }
    if not layers:
        raise LayerError(f"no layer of the model has an adapter named {adapter!r}", hint="attach LoRA layers first")
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        own = _peft_tensors(layer, layer.branch(adapter), name)
        tensors |= {f"base_model.model.{name}.{key}": tensor.detach().cpu().contiguous() for key, tensor in own.items()}
        ranks[name], alphas[name] = _rank_and_alpha(layer, adapter, own)
    everything = [plain_name(name) for name, _ in model.named_modules()]
    config = _config(ranks, alphas, everything) | {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "fan_in_fan_out": any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        "lora_dropout": max(getattr(layer.branch(adapter).dropout, "p", 0.0) for layer in layers.values()),
    }
    return _write(Path(path), tensors, config)


def _peft_tensors(layer: Mergeable, branch: Branch, name: str) -> dict[str, Tensor]:
    """The tensors of one module, with the names and shapes that PEFT gives them."""
    lora_A, lora_B = branch.lora_A, branch.lora_B
    if isinstance(layer, Embedding):
        return {"lora_embedding_A": lora_A, "lora_embedding_B": lora_B}
    if isinstance(layer, MergedLinear):
        return {"lora_A.weight": lora_A, "lora_B.weight": _block_diagonal(layer, lora_B)}
    if isinstance(layer, ConvLoRA):
        conv = layer.conv
        r = branch.lora_A.shape[0]
        if conv.groups != 1 or lora_B.shape[0] != conv.out_channels:
            raise LayerError(
                f"{name}: the update of this convolution is not one of PEFT's, a smaller convolution and a pointwise one",
                hint="lora_state_dict(model) with torch.save keeps it",
            )
        pointwise = (1,) * len(conv.kernel_size)
        return {
            "lora_A.weight": lora_A.view(r, conv.in_channels, *conv.kernel_size),
            "lora_B.weight": lora_B.view(conv.out_channels, r, *pointwise),
        }
    if isinstance(layer, Linear):
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}
    raise LayerError(f"{name}: PEFT has no format for a {type(layer).__name__}")


def _block_diagonal(layer: MergedLinear, lora_B: Tensor) -> Tensor:
    """(out_features, r · n): each enabled block's rows of lora_B, beside those of lora_A that they go with."""
    n, r = len(layer.enabled), lora_B.shape[1]
    whole = lora_B.new_zeros(layer.out_features, r * n)
    for k, block in enumerate(layer.enabled):
        rows = slice(block * layer.block_rows, (block + 1) * layer.block_rows)
        whole[rows, k * r : (k + 1) * r] = lora_B.detach()[k * layer.block_rows : (k + 1) * layer.block_rows]
    return whole


def _rank_and_alpha(layer: Mergeable, adapter: str, tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    """The rank that the tensors have, and the alpha for which alpha / rank is the layer's scaling."""
    rank = next(iter(tensors.values())).shape[0]
    holder: Any = layer if adapter == OWN else layer.lora_adapters[adapter]
    scaling = layer.branch(adapter).scaling
    alpha = float(holder.lora_alpha if holder.lora_alpha / rank == scaling else scaling * rank)
    return rank, int(alpha) if alpha.is_integer() else alpha


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], everything: list[str]) -> dict[str, Any]:
    """PEFT's configuration: the most frequent rank and alpha, and patterns where modules differ from them."""
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": _targets(list(ranks), everything),
        "rank_pattern": _pattern(ranks, r),
        "alpha_pattern": _pattern(alphas, alpha),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(names: list[str], everything: list[str]) -> list[str] | str:
    """Short ends of names where they mean these modules and no others; else a regular expression of the full names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in everything if name.rpartition(".")[2] in ends}
    return ends if meant == set(names) else "|".join(re.escape(name) for name in names)


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Where `values` differ from `default`. PEFT takes the first key that ends a module's name, so the longest come first, and
    every module has an entry as soon as one has."""
    if all(value == default for value in values.values()):
        return {}
    return {re.escape(name): values[name] for name in sorted(values, key=len, reverse=True)}


def _write(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    from safetensors.torch import save  # here, since `import loralib` does without it

    files = {
        "adapter_model.safetensors": save({key: tensors[key] for key in sorted(tensors)}, metadata={"format": "pt"}),
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = path / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(path / name)
    except OSError as error:
        raise OutputError(f"the adapter cannot be written to {path}: {error.strerror}") from error
    return path

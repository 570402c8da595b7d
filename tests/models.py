"""Tiny models of transformers with random weights, adapters that PEFT itself saves on them, and what both must merge to.

The expected numbers are taken from PEFT's own layers (which weight, which factors, which scaling) and summed by `oracle`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold import LowRankUpdate
from lorafold.errors import LorafoldError
from oracle import correctly_rounded

HIDDEN = 32


def llama(kind: str = "LlamaForCausalLM", *, tied: bool = False, bias: bool = False, seed: int = 0, layers: int = 2) -> Any:
    """A Llama of two layers; square q_proj and o_proj, k_proj and v_proj (16, 32)."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=HIDDEN, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        initializer_range=0.3, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return _noisy(getattr(transformers, kind)(config))


def gpt2(*, seed: int = 0) -> Any:
    """A GPT-2 of two layers: Conv1D weights, c_attn (32, 96), attention's c_proj square; head tied to wte."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=32, n_inner=40, bos_token_id=1, eos_token_id=2
    )
    return _noisy(transformers.GPT2LMHeadModel(config))


def _noisy(model: Any) -> Any:
    """Every parameter moved off the constant that it begins with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_base(model: Any, path: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "20KB") -> Path:
    """`model` as transformers writes it, in `dtype`; several shards by default."""
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_adapter(model: Any, path: Path, *, seed: int = 1, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """An adapter with the fields `config`, put on `model` by PEFT, all that it trains perturbed, saved by PEFT to `path`.

    `model` is used up. `dtype`: of the saved tensors, by default PEFT's choice (float32).
    """
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about transformers' deprecations and about the cases that are tested
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
                if dtype is not None:
                    parameter.data = parameter.data.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(path)
    return path


def peft_model(base: Path, adapter: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """`base` in `dtype` with `adapter` on it, unmerged, as PEFT loads both; the adapter's factors are not rounded."""
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind).from_pretrained(base, dtype=dtype)
        wrapped = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=dtype != torch.float64)
    return (wrapped.double() if dtype == torch.float64 else wrapped).eval()


def peft_edits(wrapped: Any) -> tuple[dict[str, list[LowRankUpdate]], dict[str, Tensor]]:
    """What PEFT's layers add, by the base tensor's name and as it is stored, and what they put in a tensor's place."""
    from peft.tuners.lora import Embedding, LoraLayer
    from peft.utils import ModulesToSaveWrapper

    updates: dict[str, list[LowRankUpdate]] = {}
    replaced: dict[str, Tensor] = {}
    if wrapped.peft_config["default"].bias != "none":  # trained in place
        biases = {name: value for name, value in wrapped.base_model.model.named_parameters() if name.endswith(".bias")}
        replaced |= {name.replace(".base_layer.", "."): value.data for name, value in biases.items() if ".lora_B." not in name}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save["default"].state_dict()
            replaced |= {f"{name}.{key}": value for key, value in saved.items()}
        if not isinstance(module, LoraLayer) or "default" not in module.scaling:
            continue
        scaling = module.scaling["default"]
        if isinstance(module, Embedding):
            update = LowRankUpdate(module.lora_embedding_A["default"].data, module.lora_embedding_B["default"].data, scaling).T
        else:
            update = LowRankUpdate(module.lora_A["default"].weight.data, module.lora_B["default"].weight.data, scaling)
            bias = module.lora_B["default"].bias
            if bias is not None:
                updates[f"{name}.bias"] = [LowRankUpdate(torch.ones(1, 1), bias.data[:, None], scaling)]
            if type(module.get_base_layer()).__name__ == "Conv1D":
                update = update.T
        updates[f"{name}.weight"] = [update]
    return updates, replaced


def expected(
    base: Mapping[str, Tensor], updates: Mapping[str, list[LowRankUpdate]], replaced: Mapping[str, Tensor], dtype: Any = None
) -> dict[str, Tensor]:
    """Every tensor of the merged checkpoint: sums rounded once, replacements in the base's dtype, the rest as it is."""
    out = {}
    for name, tensor in {**base, **{n: t for n, t in replaced.items() if n not in base}}.items():
        target = dtype or base.get(name, tensor).dtype
        start = replaced.get(name, tensor)
        matrix = start.reshape(start.shape[0], -1)
        if name in updates:
            rounded = torch.from_numpy(correctly_rounded(matrix, updates[name], target))
        else:
            rounded = torch.from_numpy(correctly_rounded(matrix, [], target)) if start.dtype != target else matrix
        out[name] = rounded.to(target).reshape(start.shape)
    return out


def added(*edits: Mapping[str, list[LowRankUpdate]]) -> dict[str, list[LowRankUpdate]]:
    """The updates of several adapters."""
    total: dict[str, list[LowRankUpdate]] = {}
    for each in edits:
        for name, updates in each.items():
            total[name] = [*total.get(name, []), *updates]
    return total


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's or an adapter's folder, read by safetensors itself."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def different(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Names under which the two do not hold the same bits, and how; empty where they are the same."""
    wrong = dict.fromkeys(wanted.keys() - found.keys(), "missing") | dict.fromkeys(found.keys() - wanted.keys(), "extra")
    for name in found.keys() & wanted.keys():
        one, other = found[name], wanted[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            wrong[name] = f"{one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
        elif one.numel() and not torch.equal(
            one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
        ):
            wrong[name] = f"{int((one != other).sum())} of {one.numel()} elements"
    return wrong


def rewritten(adapter: Path, path: Path, *, rename: Callable[[str], str | None] | None = None, **fields: Any) -> Path:
    """A copy of `adapter` at `path` with tensors renamed (or dropped, where `rename` gives None) and fields of its config set."""
    path.mkdir(parents=True)
    held = load_file(adapter / "adapter_model.safetensors")
    names = {name: rename(name) if rename else name for name in held}
    save_file({new: held[old] for old, new in names.items() if new is not None}, path / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Let `change` make the tensors of an adapter's or a checkpoint's one file from those it holds."""
    (file,) = folder.glob("*.safetensors")
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(dict(change(held)), file, metadata={"format": "pt"})


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def plain_base(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, modules: Iterable[str] = ("q_proj", "v_proj"), size: int = 8
) -> Path:
    """A checkpoint without transformers: `size` × `size` weights of two layers, and a norm; two shards and an index."""
    path.mkdir(parents=True)
    random = np.random.default_rng(5)
    shards = []
    for layer in range(2):
        names = [f"model.layers.{layer}.{module}.weight" for module in modules]
        shard = {name: torch.from_numpy(random.standard_normal((size, size))).to(dtype) for name in names}
        shard[f"model.layers.{layer}.norm.weight"] = torch.from_numpy(random.standard_normal(size)).to(dtype)
        shards.append(shard)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": size, "dtype": "bfloat16"}))
    return path


def plain_adapter(
    path: Path, *, modules: Iterable[str] = ("q_proj", "v_proj"), size: int = 8, r: int = 2, seed: int = 7, **fields: Any
) -> Path:
    """A PEFT directory for `plain_base`, without PEFT."""
    path.mkdir(parents=True)
    random = np.random.default_rng(seed)
    held = {}
    for layer in range(2):
        for module in modules:
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            held[f"{prefix}.lora_A.weight"] = torch.from_numpy(random.standard_normal((r, size))).float()
            held[f"{prefix}.lora_B.weight"] = torch.from_numpy(random.standard_normal((size, r))).float()
    save_file(held, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": list(modules), "base_model_name_or_path": "org/tiny"}
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def copied(folder: Path, path: Path) -> Path:
    return Path(shutil.copytree(folder, path))


def refused(base: Path, adapters: Any, kind: type[LorafoldError], *parts: str, **options: Any) -> LorafoldError:
    """The error of a merge into a place beside `base`: of exactly this kind, with `parts` in its text, and nothing left behind."""
    before = sorted(os.listdir(base.parent))
    with pytest.raises(LorafoldError) as caught:
        lorafold.merge(base, adapters, base.parent / "out", **options)
    assert type(caught.value) is kind, caught.value
    for part in parts:
        assert part in str(caught.value)
    assert sorted(os.listdir(base.parent)) == before
    assert caught.value.exit_code == 1
    return caught.value

"""A Llama checkpoint of a chosen size with random weights, and a PEFT adapter for it: what the file benchmarks merge.

Everything is seeded, and written shard by shard, so that a checkpoint larger than memory can be made.

    python benchmarks/synthetic.py 1.1b benchmarks/data/1.1b-base
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 500_000_000
STD = 0.02  # of the base's weights
RELATIVE_UPDATE = 0.01  # ‖ΔW‖ / ‖W‖


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers of one decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order of the model."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for i in range(self.layers):
            for name, shape in self.linears().items():
                yield f"model.layers.{i}.{name}.weight", shape
            yield f"model.layers.{i}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{i}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES = {
    "tiny": Shape(256, 4, 704, 8, 2, 1000),
    "0.3b": Shape(1024, 20, 2816, 16, 4, 32000),
    "1.1b": Shape(2048, 22, 5632, 32, 4, 32000),  # TinyLlama's
    "3b": Shape(3072, 28, 8192, 24, 8, 32000),
}
TARGETS = {"all-linear": None, "qv": ("q_proj", "v_proj")}


def make_base(shape: Shape, out: Path) -> None:
    """Write a bfloat16 checkpoint to `out`, in shards of at most `SHARD_BYTES` as transformers would."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards = _shards(shape)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({tensor: _weight(size, generator) for tensor, size in shard}, partial / name, metadata={"format": "pt"})
        weight_map |= {tensor: name for tensor, _ in shard}
    total = sum(_nbytes(size) for _, size in shape.tensors())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (partial / "config.json").write_text(json.dumps(_config(shape), indent=2))
    partial.rename(out)


def make_adapter(shape: Shape, rank: int, targets: tuple[str, ...] | None, out: Path) -> None:
    """Write a float32 adapter to `out` as PEFT does, with ‖ΔW‖ near `RELATIVE_UPDATE` · ‖W‖ in every target."""
    generator = torch.Generator().manual_seed(1)
    scaling = 2
    tensors: dict[str, Tensor] = {}
    for i in range(shape.layers):
        for name, (rows, columns) in shape.linears().items():
            if targets is not None and name.rpartition(".")[2] not in targets:
                continue
            prefix = f"base_model.model.model.layers.{i}.{name}"
            # elements of B @ A have variance r · var(A) · var(B), and var(A) = 1 / columns
            std_b = RELATIVE_UPDATE * STD * math.sqrt(columns / rank) / scaling
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * std_b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _shards(shape: Shape) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, size in shape.tensors():
        if shards[-1] and filled + _nbytes(size) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += _nbytes(size)
    return shards


def _nbytes(size: tuple[int, ...]) -> int:
    return 2 * math.prod(size)


def _weight(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * STD).to(torch.bfloat16)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a checkpoint with random weights, or an adapter for it.")
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", metavar="TARGETS", choices=TARGETS, help="make an adapter instead of a checkpoint")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    if args.adapter is None:
        make_base(SHAPES[args.size], args.out)
    else:
        make_adapter(SHAPES[args.size], args.rank, TARGETS[args.adapter], args.out)

"""One update of a tiny Llama, written in each format by independent means: numpy, safetensors, torch.save, the gguf package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HEADS, KEYS, WIDTH, INNER, VOCAB = 2, 1, 8, 6, 11
R, ALPHA = 2, 6.0
SHAPES = {
    "self_attn.q_proj": (8, WIDTH), "self_attn.k_proj": (4, WIDTH), "self_attn.v_proj": (4, WIDTH), "self_attn.o_proj": (WIDTH, 8),
    "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Tensors = dict[str, torch.Tensor]


def numbers(*shape: int) -> torch.Tensor:
    """Small whole numbers: their products and sums are exact."""
    return torch.randint(-4, 5, shape).float()


def base(folder: Path, model_type: str = "llama", **config: object) -> Path:
    """A checkpoint of two layers, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "model_type": model_type, "architectures": ["LlamaForCausalLM"], "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS, "hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": VOCAB,
        "tie_word_embeddings": False, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    held = {"model.embed_tokens.weight": numbers(VOCAB, WIDTH), "lm_head.weight": numbers(VOCAB, WIDTH)}
    held |= {f"model.layers.{i}.{name}.weight": numbers(*shape) for i in range(2) for name, shape in SHAPES.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pairs(head: bool = True) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """lora_A and lora_B by module, as transformers has it."""
    shapes = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}
    shapes |= {"lm_head": (VOCAB, WIDTH)} if head else {}
    return {name: (numbers(R, inner), numbers(out, R)) for name, (out, inner) in shapes.items()}


def deltas(held: Pairs, scaling: float = ALPHA / R) -> Tensors:
    """ΔW by the name of the base tensor."""
    return {f"{name}.weight": B @ A * scaling for name, (A, B) in held.items()}


def llama_rows(B: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows in llama.cpp's and Meta's order (llama.cpp, `LlamaModel.permute`; torchtune, `hf_to_tune`)."""
    array = B.numpy()
    turned = array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
    return torch.from_numpy(np.ascontiguousarray(turned))


def _meta(name: str, B: torch.Tensor) -> torch.Tensor:
    heads = {"q_proj": HEADS, "k_proj": KEYS}.get(name.rpartition(".")[2])
    return B if heads is None else llama_rows(B, heads)


def peft(folder: Path, held: Pairs) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": None, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.lora_A.weight": A for name, (A, _) in held.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": B for name, (_, B) in held.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def mlx(folder: Path, held: Pairs) -> Path:
    folder.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": R, "scale": ALPHA / R, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"{name}.lora_a": A.T.contiguous() for name, (A, _) in held.items()}
    tensors |= {f"{name}.lora_b": B.T.contiguous() for name, (_, B) in held.items()}
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def loralib(path: Path, held: Pairs) -> Path:
    path = path.with_suffix(".pt")
    tensors = {f"{name}.lora_A": A for name, (A, _) in held.items()}
    torch.save(tensors | {f"{name}.lora_B": B for name, (_, B) in held.items()}, path)
    return path


_TUNE = {
    "self_attn.q_proj": "attn.q_proj", "self_attn.k_proj": "attn.k_proj", "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3",
}  # fmt: skip


def torchtune(folder: Path, held: Pairs) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": ALPHA}))
    tensors: Tensors = {}
    for name, (A, B) in held.items():
        _, layers, rest = name.partition("model.layers.")
        i, _, inner = rest.partition(".")
        plain = f"layers.{i}.{_TUNE[inner]}" if layers else "output"
        tensors |= {f"{plain}.lora_a.weight": A, f"{plain}.lora_b.weight": _meta(name, B)}
    torch.save(tensors, folder / "adapter_model.pt")
    return folder


_LIT = {
    "self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj"
}  # fmt: skip


def litgpt(folder: Path, held: Pairs) -> Path:
    folder.mkdir()
    tensors: Tensors = {}
    for i in range(2):
        three = [held[f"model.layers.{i}.self_attn.{each}_proj"] for each in "qkv"]
        tensors[f"transformer.h.{i}.attn.qkv.lora_A"] = torch.cat([A for A, _ in three])
        tensors[f"transformer.h.{i}.attn.qkv.lora_B"] = torch.cat([B for _, B in three])
        for name, lit in _LIT.items():
            A, B = held[f"model.layers.{i}.{name}"]
            tensors |= {f"transformer.h.{i}.{lit}.lora_A": A, f"transformer.h.{i}.{lit}.lora_B": B}
    if "lm_head" in held:
        tensors |= dict(zip(("lm_head.lora_A", "lm_head.lora_B"), held["lm_head"], strict=True))
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    lines = [
        "checkpoint_dir: x",
        f"lora_r: {R}",
        f"lora_alpha: {ALPHA:g}",
        "lora_query: true",
        "lora_key: true",
        "lora_value: true",
    ]
    (folder / "hyperparameters.yaml").write_text("\n".join([*lines, "data:", "  lora_r: 99"]) + "\n")
    return folder


_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf(path: Path, held: Pairs) -> Path:
    import gguf as package

    path = path.with_suffix(".gguf")
    writer = package.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    writer.add_array("general.tags", ["one", "two"])
    for name, (A, B) in held.items():
        _, layers, rest = name.partition("model.layers.")
        i, _, inner = rest.partition(".")
        plain = f"blk.{i}.{_GGUF[inner]}" if layers else "output"
        writer.add_tensor(f"{plain}.weight.lora_a", A.numpy())
        writer.add_tensor(f"{plain}.weight.lora_b", _meta(name, B).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WRITERS: dict[str, Callable[[Path, Pairs], Path]] = {
    "peft": peft, "mlx": mlx, "loralib": loralib, "torchtune": torchtune, "litgpt": litgpt, "gguf": gguf
}  # fmt: skip

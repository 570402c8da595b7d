"""What llama.cpp calls the modules of a model, as a table, and which families have queries and keys in another order there.

Names are those of `gguf/tensor_mapping.py`, orders those of `convert_hf_to_gguf.py` (`undo_permute`), in llama.cpp.
"""

from __future__ import annotations

import re

_DECODER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PHI3 = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_WHOLE = {"token_embd": "model.embed_tokens", "output": "lm_head"}

LAYOUTS: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite"), ("model.layers", _DECODER, _WHOLE)),
    "phi3": ("model.layers", _PHI3, _WHOLE),
    "gpt2": ("transformer.h", _GPT2, {"token_embd": "transformer.wte", "output": "lm_head"}),
}
"""By `general.architecture`: what the layers lie in, the modules of a layer, and those beside them."""

PAIRED = ("llama", "granite")
"""Architectures whose queries and keys are rotated by neighbouring rows."""

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "granite": "granite",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""The `general.architecture` of a `model_type` of transformers."""

_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)")


def module_of(name: str, architecture: str) -> str | None:
    """The module that llama.cpp calls `name`; None where it is not known.

    >>> module_of("blk.3.attn_q", "llama"), module_of("blk.0.ffn_gate_exps", "llama"), module_of("output", "gpt2")
    ('model.layers.3.self_attn.q_proj', None, 'lm_head')
    """
    layers, inner, whole = LAYOUTS[architecture]
    if found := _LAYER.fullmatch(name):
        return f"{layers}.{found[1]}.{inner[found[2]]}" if found[2] in inner else None
    return whole.get(name)


def name_of(module: str, architecture: str) -> str | None:
    """What llama.cpp calls `module`; None where it is not known, as all of an image's encoder.

    >>> name_of("language_model.model.layers.3.mlp.up_proj", "qwen2"), name_of("lm_head", "llama")
    ('blk.3.ffn_up', 'output')
    >>> name_of("vision_tower.encoder.layers.0.self_attn.q_proj", "gemma3") is None
    True
    """
    layers, inner, whole = LAYOUTS[architecture]
    plain = _unwrapped(module)
    for short, long in whole.items():
        if plain == _unwrapped(long):
            return short
    found = re.fullmatch(rf"{re.escape(_unwrapped(layers))}\.(\d+)\.(.+)", plain)
    return None if found is None else next((f"blk.{found[1]}.{short}" for short, long in inner.items() if long == found[2]), None)


def _unwrapped(module: str) -> str:
    """`module` without the names of what is around a language model."""
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in ("base_model", "model", "language_model", "text_model", "transformer"):
        parts.pop(0)
    return ".".join(parts)

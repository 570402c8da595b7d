"""Tiny models in GGUF, made with the gguf package as llama.cpp's converter makes them, and what they state and must merge to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

K_QUANTS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""The blocks that the gguf package reads and does not write, and where in a block their float16 scales are."""


def tiny(kind: str = "Llama", **config: Any) -> Any:
    """A model of transformers of two layers whose rows are whole blocks of 256."""
    import transformers

    torch.manual_seed(0)
    fields = {
        "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1, "pad_token_id": 0,
        "tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "layer_norm_eps": 1e-5, "norm_epsilon": 1e-5,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**fields, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order, by loops: of each head row i of its first half, then of its second."""
    size = rows.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def blocks(values: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """(…, bytes of a row): `values` in blocks; of those that nobody writes, codes at random and scales of the values' size."""
    number = gguf.GGMLQuantizationType[kind]
    if kind not in K_QUANTS:
        return gguf.quantize(values.astype(np.float32), number)
    generator = np.random.default_rng(seed)
    numel, nbytes = gguf.GGML_QUANT_SIZES[number]
    words = generator.integers(0, 256, (*values.shape[:-1], values.shape[-1] // numel, nbytes), dtype=np.uint8)
    for at in K_QUANTS[kind]:
        scales = np.abs(generator.normal(0, 1e-4, (*words.shape[:-1], 1))).astype(np.float16)
        words[..., at : at + 2] = scales.view(np.uint8)
    return words.reshape(*values.shape[:-1], -1)


def tensors_of(model: Any, architecture: str, heads: tuple[int, int] | None = (4, 2)) -> dict[str, np.ndarray]:
    """What the converter makes of the weights of `model`, by llama.cpp's names; `heads`: where rows of q and k are put in pairs."""
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, 2)
    found: dict[str, np.ndarray] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        called = names.get_name(name, (".weight", ".bias"))
        assert called is not None, name
        array = tensor.float().numpy()
        if heads is not None and ".attn_q." in called:
            array = paired(array, heads[0])
        if heads is not None and ".attn_k." in called:
            array = paired(array, heads[1])
        found[called] = array + 1 if architecture.startswith("gemma") and called.endswith("norm.weight") else array
    return found


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, str] | str = "F16",
    *,
    architecture: str = "llama",
    more: Mapping[str, Any] | None = None,
    split: int = 0,
) -> dict[str, np.ndarray]:
    """A model at `path`, matrices in the types `kinds` (by name, or all alike), vectors in F32; what it states, float64.

    `split`: how many tensors a part has at most, where it is split; `path` is then that of the first.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_context_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_token_merges(["t 0", "t 1"])
    for key, value in (more or {}).items():
        writer.add_string(key, value)
    stated = {}
    for i, (name, array) in enumerate(tensors.items()):
        kind = "F32" if array.ndim < 2 else kinds if isinstance(kinds, str) else kinds.get(name, "F16")
        number = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            held = array.astype(np.float32 if kind == "F32" else np.float16)
            writer.add_tensor(name, held)
            stated[name] = held.astype(np.float64)
        else:
            words = blocks(array, kind, i)
            writer.add_tensor(name, words, raw_dtype=number)
            stated[name] = gguf.dequantize(words, number).astype(np.float64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stated


def raw_tensors(paths: Iterable[Path]) -> dict[str, bytes]:
    """The bytes of each tensor of the files, by the gguf package's own reader."""
    return {t.name: t.data.tobytes() for path in paths for t in gguf.GGUFReader(path).tensors}


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def stated_by(path: Path) -> dict[str, np.ndarray]:
    """The numbers of each tensor, by the gguf package, float32."""
    return {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))

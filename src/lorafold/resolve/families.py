"""What is known of families of models, as tables. A new family is a new row, not a new branch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TRANSPOSED = {
    "gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "decision_transformer": ("c_attn", "c_proj", "c_fc", "q_attn"),
    "clvp": ("c_attn", "c_proj", "c_fc"),
}
"""By `model_type`: the modules whose weight is stored (in_features, out_features), transformers' Conv1D."""

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared", "tokens_embed")
"""Last names of modules that embed input tokens."""

HEADS = ("lm_head", "embed_out", "output_projection")
"""Last names of modules that turn hidden states into logits, and may be tied to the embedding."""

WRAPPERS = frozenset(
    {"base_model", "model", "module", "_orig_mod", "transformer", "language_model", "text_model", "backbone", "bert", "roberta"}
)
"""Names that wrap a model without changing it: the ones in which the same model's tensor names may differ."""

CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForImageTextToText", "ForVision2Seq")
"""How the names of the architectures end that have a head over the vocabulary."""


def stored_transposed(tensor: str, config: Mapping[str, Any] | None) -> str | None:
    """The family by which `tensor` is stored (in_features, out_features): the model's, or that of a part of it; None where none.

    >>> stored_transposed("decoder.h.0.mlp.c_fc.weight", {"model_type": "encoder-decoder", "decoder": {"model_type": "gpt2"}})
    'gpt2'
    """
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    return next((family for family in _families(config) if module in TRANSPOSED.get(family, ())), None)


def _families(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        if isinstance(family := config.get("model_type"), str):
            yield family
        for part in config.values():
            yield from _families(part)

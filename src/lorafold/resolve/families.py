"""What is known of families of models, as tables. A new family is a new row, not a new branch."""

from __future__ import annotations

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

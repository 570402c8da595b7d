"""The weights that transformers stores (in_features, out_features), those of its Conv1D, by the type of the model.

What is quantised as a linear layer is stored (out_features, in_features) all the same; so whoever decodes it has to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_GPT2 = ("c_attn", "c_proj", "c_fc", "q_attn")
_GPT = ("c_attn", "c_proj", "c_fc")

CONV1D: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt2", "imagegpt", "decision_transformer"), _GPT2),
    **dict.fromkeys(("openai-gpt", "clvp"), _GPT),
}
"""What the modules of that class are called, by `model_type`."""


def model_types(config: Any) -> Iterator[str]:
    """Every `model_type` that the configuration of a model and of its parts states, the model's own first."""
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping):
            if isinstance(family := part.get("model_type"), str):
                yield family
            parts += list(part.values())[::-1]


def stored_transposed(tensor: str, types: Iterable[str]) -> str | None:
    """The one of a model's `types` by which `tensor` is stored (in_features, out_features); None where none is.

    >>> stored_transposed("decoder.h.0.mlp.c_fc.weight", ("encoder-decoder", "gpt2"))
    'gpt2'
    """
    module = tensor.removesuffix(".weight").rpartition(".")[2]
    return next((name for name in types if module in CONV1D.get(name, ())), None)

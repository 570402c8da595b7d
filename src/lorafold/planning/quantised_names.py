"""What the names of models say of quantisation: hints, no proofs, on whether an adapter was trained against the weights at hand."""

from __future__ import annotations

import re

from ..adapters.adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint
from ..errors import printable

_QUANTISED = re.compile(
    r"(?<![a-z0-9])(bnb|nf4|fp4|nvfp4|mxfp4|fp8|awq|gptq|int4|int8|[48]bit|w4a16|w8a8|w8a16|hqq|gguf|q[2-8]_[0-9k]\w*)(?![a-z0-9])"
)


def quantised_by_name(name: str | None) -> str | None:
    """The word in the name of a model that says how it is quantised; None where there is none.

    >>> quantised_by_name("unsloth/llama-3-8b-bnb-4bit"), quantised_by_name("Qwen/Qwen3-8B-FP8"), quantised_by_name("org/fp8ball")
    ('bnb', 'fp8', None)
    """
    found = _QUANTISED.search((name or "").rpartition("/")[2].lower())
    return None if found is None else found[1]


def trained_notes(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """What a reader should know where `adapter` was trained, by the name that it gives, on weights quantised otherwise."""
    trained, shown = quantised_by_name(adapter.base_model), printable(adapter.name)
    if trained is not None and not checkpoint.encoded and not checkpoint.live:
        return [
            f"{shown} names {printable(str(adapter.base_model))}, which by its name is quantised: it was trained against those"
            " weights, and this base has others. The merged model is not the one that was trained, though often as good; for that"
            " one merge into the base that it names"
        ]
    moved = next((each.encoding for each in checkpoint.encoded.values() if "awq" in each.encoding.lower()), None)
    if moved is not None and adapter.base_model is not None and trained not in ("awq", "w4a16"):
        return [
            f"AWQ moves factors from weights into norms and neighbours, and {shown} names {printable(adapter.base_model)}, which by"
            " its name is not AWQ: an adapter that was trained on the original weights does not fit these, and no file tells"
        ]
    return []

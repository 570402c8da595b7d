"""Which kinds of PEFT's adapters and initialisations cannot be merged, and why, as tables. A new kind is a new row.

Facts are PEFT 0.21.2's (`tuners/*/layer.py`). What is not named here and not honoured by `peftconfig` is refused as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

_TOKENS = "trains prompts or keys beside the weights, so no weight can hold it"
_ROUTES = "routes or scales by what goes in, so no weight can hold it"
_OTHER = "is no product of two trained factors alone, and its formula is not among those known here"

PEFT_TYPES: Mapping[str, str] = {
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"), _TOKENS
    ),
    **dict.fromkeys(("XLORA", "POLY"), _ROUTES),
    "VERA": "multiplies trained vectors with random projections that its file need not hold",
    "PVERA": "multiplies trained vectors with random projections, of which it samples",
    "RANDLORA": "sums random bases, which its file need not hold",
    "FOURIERFT": "holds coefficients of a Fourier transform",
    "WAVEFT": "holds coefficients of a wavelet transform",
    "VBLORA": "composes its factors from a bank of vectors, shared by all layers",
    "UNILORA": "composes its factors from one vector, shared by all layers",
    "ADALORA": "prunes its singular values while it trains: convert it to LoRA first",
    "IA3": "scales activations by trained vectors",
    "BEFT": "trains biases alone",
    "LN_TUNING": "trains norms as a whole",
    "TRAINABLE_TOKENS": "trains rows of embeddings alone, and its file has another layout than LoRA's",
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "PSOFT"), "multiplies the base weight by a rotation, where LoRA adds to it"),
    **dict.fromkeys(("LOHA", "LOKR"), "of PEFT has names of its own; a file in LyCORIS's names can be merged"),
    "HIRA": "multiplies the base weight element by element, where LoRA adds to it",
    "DELORA": "rescales its update by norms of the base weight",
    "SHIRA": "holds single elements of the weight by an index that is not in its file",
    "MISS": "repeats blocks of one matrix",
    "C3A": "holds kernels of circular convolutions",
    "OSF": "trains the singular vectors of the base weight themselves",
}
"""By `peft_type`: what keeps it from being merged, after the type's name."""

UNKNOWN_TYPE = _OTHER

FIELDS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only, so no weight can hold it",
    "arrow_config": "Arrow routes by token, so no weight can hold it",
    "megatron_config": "Megatron's parallel layers split the factors over several files",
}
"""By field of a LoRA configuration: why an adapter that has it set cannot be merged."""

_INITIAL = "what it took out of the base weight can only be told with the adapter as it was before training"

INITS: Mapping[str, str] = {
    "corda": f"CorDA computes it from the activations of its training data: {_INITIAL}",
    "lora_ga": f"LoRA-GA computes it from gradients of its training data: {_INITIAL}",
    "loftq": "LoftQ quantised the base weight with what the adapter was to mend: it belongs to that quantised base",
    "pissa_niter": f"PiSSA by a randomised decomposition: {_INITIAL}",
}
"""By the beginning of `init_lora_weights`: why the base weight that the adapter was trained on cannot be had again."""

INIT_HINT = (
    "`ReadOptions(initial_adapter=…)` gives the adapter as it was before training, where that was saved; PEFT can make it plain"
    " LoRA with it too: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
)

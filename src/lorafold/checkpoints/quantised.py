"""Whether the weights of a checkpoint stand for other numbers than they hold, and by which method: as its configuration says, or as
the tensors beside them give away.
"""

from __future__ import annotations

from collections.abc import Mapping

from .checkpoint import Checkpoint

_BESIDE: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "weight.absmax": "bitsandbytes, 4 bits",
    "weight.quant_map": "bitsandbytes, 4 bits",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes, NF4",
    "weight.quant_state.bitsandbytes__fp4": "bitsandbytes, FP4",
    "SCB": "bitsandbytes, LLM.int8",
    "weight_scale_inv": "FP8 with a scale for each block",
    "weight_scale": "FP8 or INT8 with scales",
    "weight_scale_2": "NVFP4",
    "scale_weight": "FP8 with a scale",
    "weight_blocks": "MXFP4",
    "weight_scales": "MXFP4",
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight._scale": "quanto",
    "codebooks": "AQLM",
}
"""What the tensors are called that a method keeps for a module, after the module's name."""


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """The method by which `checkpoint` is quantised, as its configuration has it or its tensors' names; None where it is not."""
    for place in (checkpoint.config or {}, (checkpoint.config or {}).get("text_config") or {}):
        found = place.get("quantization_config") if isinstance(place, dict) else None
        if isinstance(found, dict):
            return str(found.get("quant_method", "of unknown kind"))
    for name in checkpoint.tensors:
        if (method := method_beside(name.rpartition(".")[0].removesuffix(".weight"), checkpoint)) is not None:
            return method
    return None


def method_beside(module: str, checkpoint: Checkpoint) -> str | None:
    """The method by which the weight of `module` is quantised, by the names of the tensors beside it; None where it is not.

    >>> from pathlib import Path
    >>> method_beside("q_proj", Checkpoint(Path(), (), {"q_proj.weight": None, "q_proj.SCB": None}, None, {}, False))
    'bitsandbytes, LLM.int8'
    """
    return next((method for suffix, method in _BESIDE.items() if f"{module}.{suffix}" in checkpoint.tensors), None)

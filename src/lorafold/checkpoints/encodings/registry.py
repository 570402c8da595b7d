"""The table of encodings: of each family how its weights are found, in the order in which they are looked for.

A line here makes a format known, to `open_checkpoint` and to all that reads its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bitsandbytes import find_bitsandbytes
from .compressed import find_compressed
from .encoded import Find
from .fp8 import find_fp8
from .gptq import find_gptq
from .hqq import find_hqq
from .microscaling import find_microscaling
from .plain_fp8 import find_comfy, find_fbgemm_experts, find_torchao


@dataclass(frozen=True)
class EncodingFormat:
    """One family.

    - `name`: what it is called; `find`: how its weights are found
    - `as_linear`: whether it makes a linear layer of transformers' Conv1D first, and so stores its weight (out, in)
    """

    name: str
    find: Find
    as_linear: bool = False


ENCODINGS: tuple[EncodingFormat, ...] = (
    EncodingFormat("FP8", find_fp8),
    EncodingFormat("bitsandbytes", find_bitsandbytes, as_linear=True),
    EncodingFormat("MXFP4, MXFP6, MXFP8 and NVFP4", find_microscaling),
    EncodingFormat("integers of compressed-tensors", find_compressed),
    EncodingFormat("GPTQ and AWQ", find_gptq, as_linear=True),
    EncodingFormat("HQQ", find_hqq),
    EncodingFormat("torchao", find_torchao),
    EncodingFormat("experts of fbgemm", find_fbgemm_experts),
    EncodingFormat("FP8 with one scale or none", find_comfy),
)
"""All families. A stored tensor that one has taken is not shown to those after it."""

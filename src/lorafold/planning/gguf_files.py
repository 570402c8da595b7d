"""The one file of an output in GGUF: its key-value pairs, which are the base's, and the types of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..checkpoints.checkpoint import Checkpoint
from ..errors import PlanError
from ..files.gguf.ggml_types import GGML_NUMBERS, GGML_TYPES
from ..files.gguf.gguf_header import RECEIPT_KEY, GgufHeader
from ..files.gguf.gguf_layout import GgufSpec, number_pair
from ..options import SumOptions
from .output_files import OUT_GGUF
from .plan import MergePlan, PlannedShard, Step

_FILE_TYPE = "general.file_type"
_FILE_TYPES: Mapping[str, int] = {"F32": 0, "F16": 1, "BF16": 32}
"""``enum llama_ftype`` of llama.cpp, by the type that matrices are of."""

_SPLIT = "split."
_IMATRIX = "quantize.imatrix."


def check_gguf_options(options: SumOptions) -> None:
    """Raises `PlanError` where `options` ask for what an output in GGUF cannot be."""
    if options.max_shard_size is not None:
        raise PlanError("an output in GGUF is one file", hint="leave out `max_shard_size=…`; llama.cpp's gguf-split divides it")
    if options.only_changed:
        raise PlanError("an output of changed tensors alone is no model that GGUF can hold", hint="leave out `only_changed=True`")
    if options.dtype == "F64":
        raise PlanError("llama.cpp computes with no weights of float64", hint="leave out `dtype=…`, or give one of 32 or 16 bits")


def gguf_pairs(plan: MergePlan, checkpoint: Checkpoint) -> list[bytes]:
    """The pairs of the output of `plan`, each as its bytes: those of the base's first file, but for what would not be true."""
    dtype = plan.options.dtype or plan.options.float_format
    found = []
    for key, pair in ({} if checkpoint.gguf is None else checkpoint.gguf.pairs).items():
        if key.startswith(_SPLIT) or key == RECEIPT_KEY or (dtype is not None and key.startswith(_IMATRIX)):
            continue
        found.append(number_pair(key, _FILE_TYPES[dtype]) if key == _FILE_TYPE and dtype is not None else pair)
    return found


def gguf_specs(shard: PlannedShard, checkpoint: Checkpoint) -> list[GgufSpec]:
    """The tensors of the output, in the order of the plan."""
    headers = [each.header for each in checkpoint.shards]
    kinds = {name: kind for header in headers if isinstance(header, GgufHeader) for name, kind in header.kinds.items()}
    return [_spec(step, kinds) for step in shard.steps]


def as_output(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, its one file called as in the plans and receipts of outputs in GGUF, whatever its name is."""
    if checkpoint.gguf is None or len(checkpoint.shards) > 1:
        return checkpoint
    return replace(checkpoint, shards=(replace(checkpoint.shards[0], name=OUT_GGUF),))


def _spec(step: Step, kinds: Mapping[str, int]) -> GgufSpec:
    if step.action not in ("copy", "encode"):
        return GgufSpec(step.tensor, GGML_NUMBERS[step.dtype], step.shape)
    number = kinds[str(step.source)]
    kind = GGML_TYPES[number]
    shape = (*step.shape[:-1], step.shape[-1] // kind.nbytes * kind.numel) if step.dtype == "U8" else step.shape
    return GgufSpec(step.tensor, number, shape)

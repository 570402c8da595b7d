"""What the configuration of a checkpoint says of its quantisation, where it says so, and which methods are not decoded, and why.

The tensors decide what a weight is (`encodings/`); the configuration is held against them, and goes from an output of floats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, printable
from ..files import strictjson
from .locate import resolve_entry

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

FIELDS = ("quantization_config", "compression_config")
"""What the part of config.json is called, at the top or in the configuration of a part of the model."""

FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files of their own: ModelOpt's (which vLLM reads even where config.json says nothing), GPTQ's, AWQ's."""


@dataclass(frozen=True)
class Quantisation:
    """What a configuration says.

    - `method`: as it calls it; `config`: all of it; `file`: the name of the file that it stands in
    - `paths`: dotted paths of all such parts of config.json; `files`: names of the files of their own that there are
    """

    method: str
    config: Mapping[str, Any]
    file: str
    paths: tuple[str, ...] = ()
    files: tuple[str, ...] = field(default=())


def quantisation_in(root: Path, config: Mapping[str, Any] | None, *, beside: bool) -> Quantisation | None:
    """What the `config` of the checkpoint in `root` says, or a file of its own where `beside` may be looked for; None: nothing.

    Raises `CheckpointError` where such a file is damaged.
    """
    places = list(_places(config or {}))
    found = [(path, value) for path, value in places if isinstance(value, Mapping)]
    files = tuple(name for name in FILES if beside and os.path.lexists(root / name))
    paths = tuple(path for path, _ in places)
    if found:
        return Quantisation(_method(found[0][1]), found[0][1], "config.json", paths, files)
    for name in files:
        resolve_entry(root, name)
        value = strictjson.load(root / name, error=CheckpointError, allow_nonfinite=True)
        if not isinstance(value, dict):
            raise CheckpointError(f"{printable(str(root / name))} must hold a JSON object")
        inner = value.get("quantization", value)
        stated = inner if isinstance(inner, dict) else value
        method = str(stated.get("quant_algo") or stated.get("quant_method") or _OF_FILE[name])
        return Quantisation(method, {"quant_method": _OF_FILE[name], **stated}, name, paths, files)
    return Quantisation("of unknown kind", {}, "config.json", paths, files) if paths and any(v for _, v in places) else None


_OF_FILE = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}


def _method(config: Mapping[str, Any]) -> str:
    return str(config.get("quant_method") or config.get("quant_algo") or "of unknown kind")


def _places(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and the value of each such part of `config`, those at the top first."""
    yield from ((f"{above}{name}", config[name]) for name in FIELDS if name in config)
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in FIELDS and "." not in name:
            yield from _places(value, f"{above}{name}.")


REFUSED: Mapping[str, str] = {
    "eetq": "its bytes are permuted for one kind of GPU",
    "marlin": "its words are permuted for one kind of GPU",
    "gptq_marlin": "its words are permuted for one kind of GPU",
    "marlin-24": "its words are permuted for one kind of GPU, and half of its weights are left out",
    "gemv_fast": "its words are permuted for one kind of GPU",
    "bitblas": "its words are permuted for one kind of GPU",
    "aqlm": "its codebooks are trained, and no sum can be written with them",
    "vptq": "its codebooks are trained, and no sum can be written with them",
    "spqr": "its outliers are stored apart",
    "quip": "its weights are rotated",
    "higgs": "its weights are rotated",
    "fp_quant": "its weights are rotated",
    "exl2": "its layout belongs to one program",
    "exl3": "its weights are rotated",
    "bitnet": "a weight of three values holds no small update",
    "quark": "its layout is not known",
    "quanto": "its layout belongs to one program",
}
"""Methods whose weights are not decoded, as ``quant_method`` or a layout's name has them, and the reason."""


def refusal(checkpoint: Checkpoint) -> str | None:
    """Why no weight of `checkpoint` can be decoded, in words; None where nothing speaks against it."""
    quantisation = checkpoint.quantisation
    factors = next((name for name in checkpoint.stored if name.endswith(".pre_quant_scale")), None)
    if factors is not None:
        return (
            f"tensor '{printable(factors)}' divides what goes into the layer (ModelOpt's AWQ or SmoothQuant), so that the weight"
            " stands for other numbers than it states"
        )
    if quantisation is None:
        return None
    config, where = quantisation.config, quantisation.file
    transform = config.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups", transform):
        return f"the transform_config in {where} says that weights are rotated"
    sparsity = config.get("sparsity_config")
    layout = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) and sparsity else "dense"
    if layout not in ("dense", None):
        return f"the sparsity_config in {where} says that weights are stored as '{printable(str(layout))}'"
    stated = [str(config.get(name, "")).lower() for name in ("quant_method", "format", "checkpoint_format", "version", "backend")]
    found = next((name for name in stated if name in REFUSED), None)
    return None if found is None else f"{where} says {found}: {REFUSED[found]}"


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
    "qscale_weight": "FP8 with a scale",
    "weight_blocks": "MXFP4",
    "weight_scales": "EETQ",
    "W_q": "HQQ",
    "weight._data": "quanto",
    "weight._scale": "quanto",
    "codebooks": "AQLM",
}
"""What the tensors are called that a method keeps for a module, after the module's name, where they were not decoded."""


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """The method by which `checkpoint` is quantised, as its configuration has it or its tensors' names; None where it is not."""
    if checkpoint.quantisation is not None:
        return checkpoint.quantisation.method
    if checkpoint.encoded:
        return next(iter(checkpoint.encoded.values())).encoding
    for name in checkpoint.tensors:
        if (method := method_beside(name.rpartition(".")[0].removesuffix(".weight"), checkpoint)) is not None:
            return method
    return None


def method_beside(module: str, checkpoint: Checkpoint) -> str | None:
    """The method by which the weight of `module` is quantised, by tensors beside it that nothing has decoded; None where it is not.

    >>> from lorafold.checkpoints.checkpoint import Checkpoint
    >>> method_beside("q_proj", Checkpoint(Path(), (), {"q_proj.weight": None, "q_proj.SCB": None}, None, {}, False))
    'bitsandbytes, LLM.int8'
    """
    return next((method for suffix, method in _BESIDE.items() if f"{module}.{suffix}" in checkpoint.tensors), None)

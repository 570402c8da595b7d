"""Which weights of a base transformers would quantise when it loads the model with bitsandbytes: it is asked itself.

Which layers a class has depends on its whole configuration, so no table has them: the class is built without memory for its
weights. This is the one place of the package that looks for transformers, and only where an option needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.conv1d import stored_transposed
from ..errors import CheckpointError, PlanError, printable
from .replacements import MERGEABLE


@dataclass(frozen=True)
class LinearLayers:
    """The weights that are quantised, by their names in the base; `asked`: who says so; `notes`: what a reader should know."""

    names: frozenset[str]
    asked: str
    notes: tuple[str, ...] = ()


def linear_layers(checkpoint: Checkpoint) -> LinearLayers:
    """The weights of the linear layers of `checkpoint` that transformers quantises with bitsandbytes: all but the head, what is
    tied, and what the class keeps in float32 (`quantizers/base.py`, `get_modules_to_not_convert`).

    Raises `PlanError` where transformers is not installed, or does not know the class; `CheckpointError` where the base does not
    have the weight of such a layer as one tensor of floats.
    """
    transformers = _transformers()
    model = _built(transformers, checkpoint)
    try:
        skipped = transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        convert = import_module("transformers.quantizers.quantizers_utils").should_convert_module
        turned = import_module("transformers.pytorch_utils").Conv1D
    except (AttributeError, ImportError):
        raise _missing(f"transformers {transformers.__version__} is too old") from None
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, turned)) and convert(name, skipped):
            tensor = _tensor(transformers, model, f"{name}.weight", checkpoint)
            _check(tensor, name, module, isinstance(module, turned), checkpoint)
            found[tensor] = name
    if not found:
        raise PlanError(f"{printable(type(model).__name__)} has no linear layer that bitsandbytes quantises", hint=_WITHOUT)
    stacks = [name for name, each in model.named_parameters() if each.dim() == 3 and "expert" in name]
    notes = ("experts are no linear layers in transformers 5, and stay floats here; training with transformers 4 quantised them",)
    return LinearLayers(frozenset(found), f"transformers {transformers.__version__}", notes if stacks else ())


_WITHOUT = "nothing was written; without `quantised_as=…` the adapter is merged into the base as it is stored"


def _missing(why: str) -> PlanError:
    return PlanError(
        f"which layers were quantised in training is transformers' to say, and {why}",
        hint="nothing was written; pip install 'transformers>=5'",
    )


def _transformers() -> Any:
    try:
        found = import_module("transformers")
        import_module("transformers.quantizers.base")
    except ImportError:
        raise _missing("it is not installed") from None
    return found


def _built(transformers: Any, checkpoint: Checkpoint) -> Any:
    """The model, its weights without memory."""
    config, where = checkpoint.config, printable(str(checkpoint.root))
    if config is None:
        raise PlanError(f"{where} has no config.json, which says what layers there are", hint=_WITHOUT)
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    model_type = config.get("model_type")
    kind = getattr(transformers, architecture, None) if architecture is not None else None
    known = isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING
    if not known or not isinstance(kind, type) or "auto_map" in config:
        shown = printable(str(architecture or config.get("_class_name") or model_type))[:60]
        raise PlanError(
            f"{where}: which layers of {shown} are quantised in training is not known: transformers has no such class",
            hint=_WITHOUT,
        )
    try:
        made = transformers.CONFIG_MAPPING[model_type].from_dict(config)
        with torch.device("meta"):
            return kind(made)
    except Exception as cause:  # transformers raises anything for a configuration that it does not like
        raise PlanError(
            f"{where}: transformers {transformers.__version__} cannot build {printable(str(architecture))}:"
            f" {printable(str(cause))[:200]}",
            hint=_WITHOUT,
        ) from cause


def _spelled(transformers: Any, model: Any, name: str) -> Iterator[str]:
    """The names that the parameter `name` of the model may have in files: its own, transformers', without the model's header."""
    yield name
    try:
        revert = import_module("transformers.core_model_loading").revert_weight_conversion
        held = revert(model, {name: torch.empty(4, 4, dtype=torch.float32, device="cpu")})
    except Exception:  # of a weight that is made of others
        held = {}
    names = [name, *(held if isinstance(held, Mapping) and len(held) == 1 else ())]
    yield from names
    prefix = f"{model.base_model_prefix}."
    for each in names:
        yield each.removeprefix(prefix)
        yield f"{prefix}{each}"


def _tensor(transformers: Any, model: Any, name: str, checkpoint: Checkpoint) -> str:
    """What the base calls the parameter `name` of the model."""
    found = next((each for each in _spelled(transformers, model, name) if each in checkpoint.tensors), None)
    if found is None:
        raise CheckpointError(
            f"{printable(str(checkpoint.root))}: {type(model).__name__} has the linear layer '{printable(name)}', which training"
            " quantised, and the base has no tensor of that name",
            hint=_WITHOUT,
        )
    return found


def _check(tensor: str, name: str, module: Any, turned: bool, checkpoint: Checkpoint) -> None:
    matrix, shape = checkpoint.tensors[tensor], tuple(module.weight.shape)
    if matrix.shape != shape or matrix.dtype not in MERGEABLE:
        raise CheckpointError(
            f"{printable(str(checkpoint.file_of(matrix)))}: tensor '{printable(tensor)}' is {list(matrix.shape)} of {matrix.dtype},"
            f" expected floats of {list(shape)}, as the layer '{printable(name)}' has them",
            hint=_WITHOUT,
        )
    if turned != (stored_transposed(tensor, checkpoint.model_types) is not None):
        raise CheckpointError(
            f"{printable(str(checkpoint.root))}: which way round '{printable(tensor)}' is stored is not known", hint=_WITHOUT
        )

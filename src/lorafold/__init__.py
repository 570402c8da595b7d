"""Fold LoRA updates into model weights, and take them out again: exact, complete, proven.

The public names, and nothing else. Each is imported when it is first asked for: ``lorafold --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters.adapter import Adapter as Adapter
    from .adapters.adapter import WeightedAdapter as WeightedAdapter
    from .adapters.load import load_adapter as load_adapter
    from .adapters.options import ReadOptions as ReadOptions
    from .api.converting import Conversion as Conversion
    from .api.converting import convert as convert
    from .api.live import LiveMerge as LiveMerge
    from .api.live import merge_into as merge_into
    from .api.merging import merge as merge
    from .api.merging import merge_each as merge_each
    from .api.merging import plan as plan
    from .api.unmerging import unmerge as unmerge
    from .api.verifying import verify as verify
    from .checkpoints.checkpoint import Checkpoint as Checkpoint
    from .checkpoints.open import open_checkpoint as open_checkpoint
    from .engine.proof import Proof as Proof
    from .engine.report import MergeReport as MergeReport
    from .errors import LorafoldError as LorafoldError
    from .kernel.merge import merge_weight as merge_weight
    from .kernel.rounding import Stochastic as Stochastic
    from .kernel.stats import Kept as Kept
    from .kernel.update import LowRankUpdate as LowRankUpdate
    from .kernel.update import scaling_factor as scaling_factor
    from .nn import add_adapter as add_adapter
    from .nn import attach as attach
    from .nn import detach as detach
    from .nn import iter_merged as iter_merged
    from .nn import load_adapter_into as load_adapter_into
    from .nn import lora_state_dict as lora_state_dict
    from .nn import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from .nn import merged as merged
    from .nn import merged_state_dict as merged_state_dict
    from .nn import model_lock as model_lock
    from .nn import remove_adapter as remove_adapter
    from .nn import save_adapter as save_adapter
    from .nn import set_active as set_active
    from .nn import swap as swap
    from .nn import tag_state_dict as tag_state_dict
    from .nn import untie as untie
    from .nn.layers import Conv1d as Conv1d
    from .nn.layers import Conv2d as Conv2d
    from .nn.layers import Conv3d as Conv3d
    from .nn.layers import ConvLoRA as ConvLoRA
    from .nn.layers import Embedding as Embedding
    from .nn.layers import Linear as Linear
    from .nn.layers import LoRALayer as LoRALayer
    from .nn.layers import MergedLinear as MergedLinear
    from .options import SumOptions as SumOptions
    from .planning.plan import MergePlan as MergePlan

_HOME = {
    "adapters.adapter": ("Adapter", "WeightedAdapter"),
    "adapters.load": ("load_adapter",),
    "adapters.options": ("ReadOptions",),
    "api.converting": ("Conversion", "convert"),
    "api.live": ("LiveMerge", "merge_into"),
    "api.merging": ("merge", "merge_each", "plan"),
    "api.unmerging": ("unmerge",),
    "api.verifying": ("verify",),
    "checkpoints.checkpoint": ("Checkpoint",),
    "checkpoints.open": ("open_checkpoint",),
    "engine.proof": ("Proof",),
    "engine.report": ("MergeReport",),
    "errors": ("LorafoldError",),
    "kernel.merge": ("merge_weight",),
    "kernel.rounding": ("Stochastic",),
    "kernel.stats": ("Kept",),
    "kernel.update": ("LowRankUpdate", "scaling_factor"),
    "nn": (
        "add_adapter",
        "attach",
        "detach",
        "iter_merged",
        "load_adapter_into",
        "lora_state_dict",
        "mark_only_lora_as_trainable",
        "merged",
        "merged_state_dict",
        "model_lock",
        "remove_adapter",
        "save_adapter",
        "set_active",
        "swap",
        "tag_state_dict",
        "untie",
    ),
    "nn.layers": ("Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"),
    "options": ("SumOptions",),
    "planning.plan": ("MergePlan",),
}

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    for room, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f".{room}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

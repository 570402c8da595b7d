"""Fold LoRA updates into model weights, and take them out again: exact, complete, proven.

The public names, and nothing else. Each is imported when it is first asked for: ``lorafold --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters import Adapter as Adapter
    from .adapters import ReadOptions as ReadOptions
    from .adapters import WeightedAdapter as WeightedAdapter
    from .adapters import load_adapter as load_adapter
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import open_checkpoint as open_checkpoint
    from .converting import Conversion as Conversion
    from .converting import convert as convert
    from .errors import LorafoldError as LorafoldError
    from .kernel import Kept as Kept
    from .kernel import Stochastic as Stochastic
    from .kernel import merge_weight as merge_weight
    from .layers import Conv1d as Conv1d
    from .layers import Conv2d as Conv2d
    from .layers import Conv3d as Conv3d
    from .layers import ConvLoRA as ConvLoRA
    from .layers import Embedding as Embedding
    from .layers import Linear as Linear
    from .layers import LoRALayer as LoRALayer
    from .layers import MergedLinear as MergedLinear
    from .mergeinto import LiveMerge as LiveMerge
    from .mergeinto import merge_into as merge_into
    from .merging import merge as merge
    from .merging import merge_each as merge_each
    from .merging import plan as plan
    from .model import add_adapter as add_adapter
    from .model import attach as attach
    from .model import detach as detach
    from .model import iter_merged as iter_merged
    from .model import load_adapter_into as load_adapter_into
    from .model import lora_state_dict as lora_state_dict
    from .model import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from .model import merged as merged
    from .model import merged_state_dict as merged_state_dict
    from .model import model_lock as model_lock
    from .model import remove_adapter as remove_adapter
    from .model import save_adapter as save_adapter
    from .model import set_active as set_active
    from .model import swap as swap
    from .model import tag_state_dict as tag_state_dict
    from .model import untie as untie
    from .planning import MergeOptions as MergeOptions
    from .planning import MergePlan as MergePlan
    from .proving import Proof as Proof
    from .report import MergeReport as MergeReport
    from .unmerging import unmerge as unmerge
    from .update import LowRankUpdate as LowRankUpdate
    from .update import scaling_factor as scaling_factor
    from .verifying import verify as verify

_HOME = {
    "adapters": ("Adapter", "ReadOptions", "WeightedAdapter", "load_adapter"),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "converting": ("Conversion", "convert"),
    "errors": ("LorafoldError",),
    "kernel": ("Kept", "Stochastic", "merge_weight"),
    "layers": ("Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"),
    "mergeinto": ("LiveMerge", "merge_into"),
    "merging": ("merge", "merge_each", "plan"),
    "model": (
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
    "planning": ("MergeOptions", "MergePlan"),
    "report": ("MergeReport",),
    "update": ("LowRankUpdate", "scaling_factor"),
    "proving": ("Proof",),
    "verifying": ("verify",),
    "unmerging": ("unmerge",),
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

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
    from .api import Conversion as Conversion
    from .api import LiveMerge as LiveMerge
    from .api import convert as convert
    from .api import merge as merge
    from .api import merge_each as merge_each
    from .api import merge_into as merge_into
    from .api import plan as plan
    from .api import unmerge as unmerge
    from .api import verify as verify
    from .checkpoints import Checkpoint as Checkpoint
    from .checkpoints import open_checkpoint as open_checkpoint
    from .engine import MergeReport as MergeReport
    from .engine import Proof as Proof
    from .errors import LorafoldError as LorafoldError
    from .kernel import Kept as Kept
    from .kernel import LowRankUpdate as LowRankUpdate
    from .kernel import Stochastic as Stochastic
    from .kernel import merge_weight as merge_weight
    from .kernel import scaling_factor as scaling_factor
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
    from .planning import MergeOptions as MergeOptions
    from .planning import MergePlan as MergePlan

_HOME = {
    "adapters": ("Adapter", "ReadOptions", "WeightedAdapter", "load_adapter"),
    "checkpoints": ("Checkpoint", "open_checkpoint"),
    "api": ("Conversion", "convert", "LiveMerge", "merge_into", "merge", "merge_each", "plan", "verify", "unmerge"),
    "errors": ("LorafoldError",),
    "kernel": ("Kept", "Stochastic", "merge_weight", "LowRankUpdate", "scaling_factor"),
    "nn.layers": ("Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"),
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
    "planning": ("MergeOptions", "MergePlan"),
    "engine": ("MergeReport", "Proof"),
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

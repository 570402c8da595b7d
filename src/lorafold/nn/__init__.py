"""Live models: layers that hold a LoRA update, and what is done to a whole model, names, all or nothing, files.

::

    from lorafold import nn

    nn.attach(model, "all-linear", r=8, lora_alpha=16)    # LoRA layers in place of a model's own
    nn.mark_only_lora_as_trainable(model)
    nn.save_adapter(model, "adapter")                     # PEFT's format
    with nn.merged(model):                                # W + ΔW inside, W again after, bit for bit
        ...
    nn.detach(model)

The layers do the work (`nn.layers`); the files beside them are what concerns several layers at once. Adapters of every kind go from
files into a model in memory by `lorafold.merge_into`.

These are the public names, and nothing in this room asks for them here: those that know models of PEFT too are of a room above, and
are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .attaching import add_adapter as add_adapter
from .attaching import attach as attach
from .attaching import detach as detach
from .attaching import remove_adapter as remove_adapter
from .attaching import untie as untie
from .layers import Conv1d as Conv1d
from .layers import Conv2d as Conv2d
from .layers import Conv3d as Conv3d
from .layers import ConvLoRA as ConvLoRA
from .layers import Embedding as Embedding
from .layers import Linear as Linear
from .layers import LoRALayer as LoRALayer
from .layers import MergedLinear as MergedLinear
from .layers.locks import model_lock as model_lock
from .layers.state_dict import tag_state_dict as tag_state_dict
from .loading import load_adapter_into as load_adapter_into
from .merging_layers import merge as merge
from .merging_layers import set_active as set_active
from .merging_layers import swap as swap
from .merging_layers import unmerge as unmerge
from .saving import save_adapter as save_adapter
from .training import lora_state_dict as lora_state_dict
from .training import mark_only_lora_as_trainable as mark_only_lora_as_trainable

if TYPE_CHECKING:
    from ..api.merged_tensors import iter_merged as iter_merged
    from ..api.merged_tensors import merged as merged
    from ..api.merged_tensors import merged_state_dict as merged_state_dict

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "add_adapter",
    "attach",
    "detach",
    "iter_merged",
    "load_adapter_into",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "merged",
    "merged_state_dict",
    "model_lock",
    "remove_adapter",
    "save_adapter",
    "set_active",
    "swap",
    "tag_state_dict",
    "unmerge",
    "untie",
]


def __getattr__(name: str) -> Any:
    if name in ("iter_merged", "merged", "merged_state_dict"):
        value = globals()[name] = getattr(import_module("lorafold.api.merged_tensors"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Live models: layers that hold a LoRA update, and what is done to a whole model, names, all or nothing, files.

The layers do the work (`nn.layers`); the files beside them are what concerns several layers at once."""

from .attaching import attach as attach
from .attaching import detach as detach
from .attaching import untie as untie
from .exporting import iter_merged as iter_merged
from .exporting import merged_state_dict as merged_state_dict
from .layers.state_dict import tag_state_dict as tag_state_dict
from .loading import load_adapter_into as load_adapter_into
from .merging import merge as merge
from .merging import merged as merged
from .merging import model_lock as model_lock
from .merging import set_active as set_active
from .merging import swap as swap
from .merging import unmerge as unmerge
from .named_adapters import add_adapter as add_adapter
from .named_adapters import remove_adapter as remove_adapter
from .saving import save_adapter as save_adapter
from .training import lora_state_dict as lora_state_dict
from .training import mark_only_lora_as_trainable as mark_only_lora_as_trainable

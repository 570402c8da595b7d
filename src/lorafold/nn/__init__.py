"""Live models: layers that hold a LoRA update, and what is done to a whole model, names, all or nothing, files.

The layers do the work (`nn.layers`); the files beside them are what concerns several layers at once."""

from .adapters import add_adapter as add_adapter
from .adapters import remove_adapter as remove_adapter
from .attach import attach as attach
from .attach import detach as detach
from .attach import untie as untie
from .export import iter_merged as iter_merged
from .export import merged_state_dict as merged_state_dict
from .layers.state_dict import tag_state_dict as tag_state_dict
from .load import load_adapter_into as load_adapter_into
from .merge import merge as merge
from .merge import merged as merged
from .merge import model_lock as model_lock
from .merge import set_active as set_active
from .merge import swap as swap
from .merge import unmerge as unmerge
from .save import save_adapter as save_adapter
from .training import lora_state_dict as lora_state_dict
from .training import mark_only_lora_as_trainable as mark_only_lora_as_trainable

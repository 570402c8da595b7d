"""What is done to a whole model: LoRA layers put in and taken out, adapters loaded and saved, weights merged and handed on.

The layers do the work; here is what concerns several of them at once: names, all or nothing, files."""

from ..layers.loading import tag_state_dict as tag_state_dict
from .attaching import attach as attach
from .detaching import detach as detach
from .detaching import untie as untie
from .exporting import iter_merged as iter_merged
from .exporting import merged_state_dict as merged_state_dict
from .loading import load_adapter_into as load_adapter_into
from .merging import merge as merge
from .merging import merged as merged
from .merging import model_lock as model_lock
from .merging import set_active as set_active
from .merging import swap as swap
from .merging import unmerge as unmerge
from .named import add_adapter as add_adapter
from .named import remove_adapter as remove_adapter
from .saving import save_adapter as save_adapter
from .training import lora_state_dict as lora_state_dict
from .training import mark_only_lora_as_trainable as mark_only_lora_as_trainable

"""What is done to a whole model: LoRA layers put in and taken out, adapters loaded and saved, weights merged and handed on.

The layers do the work; here is what concerns several of them at once: names, all or nothing, files.
"""

from .attach import attach as attach
from .save import save_adapter as save_adapter
from .training import lora_state_dict as lora_state_dict
from .training import mark_only_lora_as_trainable as mark_only_lora_as_trainable

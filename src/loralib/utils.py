"""loralib's functions on models."""

from lorafold.nn.training import lora_state_dict, mark_only_lora_as_trainable

__all__ = ["lora_state_dict", "mark_only_lora_as_trainable"]

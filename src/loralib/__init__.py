"""The import name of loralib, served by lorafold: the very same classes and functions."""

from .layers import Conv1d as Conv1d
from .layers import Conv2d as Conv2d
from .layers import Conv3d as Conv3d
from .layers import ConvLoRA as ConvLoRA
from .layers import Embedding as Embedding
from .layers import Linear as Linear
from .layers import LoRALayer as LoRALayer
from .layers import MergedLinear as MergedLinear
from .utils import lora_state_dict as lora_state_dict
from .utils import mark_only_lora_as_trainable as mark_only_lora_as_trainable

name = "lora"

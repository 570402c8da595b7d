"""loralib's layers."""

from lorafold.nn.layers.conv import Conv1d, Conv2d, Conv3d, ConvLoRA
from lorafold.nn.layers.embedding import Embedding
from lorafold.nn.layers.linear import Linear, MergedLinear
from lorafold.nn.layers.lora_layer import LoRALayer

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "LoRALayer", "MergedLinear"]

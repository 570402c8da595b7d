"""Layers that merge a LoRA update into their weight on `eval()` and take it out, bit for bit, on `train()`.

They take the place of loralib's: the same names, signatures, parameters and state-dict keys. A layer says what its update is
and how its weight looks as a matrix; `mergeable` does everything else, once for all of them."""

from .conv import Conv1d as Conv1d
from .conv import Conv2d as Conv2d
from .conv import Conv3d as Conv3d
from .conv import ConvLoRA as ConvLoRA
from .embedding import Embedding as Embedding
from .linear import Linear as Linear
from .linear import MergedLinear as MergedLinear
from .lora_layer import Branch as Branch
from .lora_layer import BranchFactors as BranchFactors
from .lora_layer import LoRALayer as LoRALayer
from .mergeable import Mergeable as Mergeable

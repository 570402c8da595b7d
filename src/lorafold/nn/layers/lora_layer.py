"""`LoRALayer`: what every LoRA layer has, loralib's and anyone's own."""

from __future__ import annotations

import math

from torch import nn

from ...errors import LayerError


class LoRALayer:
    """Mixin with a layer's LoRA settings: `r`, `lora_alpha`, `lora_dropout`, `merge_weights`, and whether it is `merged`.

    A layer of one's own, ``class Mine(nn.Linear, LoRALayer)``, calls `LoRALayer.__init__` after the module's. By this type
    `mark_only_lora_as_trainable` and `lora_state_dict` know it; they take its parameters whose names begin with ``lora_``.

    Raises `LayerError` where `r` is not an integer from 0 on, `lora_alpha` is not finite or `lora_dropout` is not in [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        check_settings(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout: nn.Module = nn.Dropout(p=lora_dropout) if lora_dropout > 0.0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights


def check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raises `LayerError` unless the three are what a LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 0:
        raise LayerError(f"r must be an integer, 0 or more, not {r!r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise LayerError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if isinstance(lora_dropout, bool) or not 0.0 <= lora_dropout <= 1.0:
        raise LayerError(f"lora_dropout must be a probability from 0 to 1, not {lora_dropout!r}")

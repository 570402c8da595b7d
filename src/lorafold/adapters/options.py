"""What the files of an adapter cannot tell, and its user can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ExpertLayout = Literal["peft", "expert-major"]


@dataclass(frozen=True)
class ReadOptions:
    """How adapters are to be read; None where the files decide.

    - `format`: which of the formats that fit is meant
    - `lora_alpha`: for formats that do not store it
    - `expert_layout`: how B holds the experts: ``"peft"`` rank-major, or ``"expert-major"``
    - `allow_pickle`: read .pt and .bin files, with `weights_only`
    """

    format: str | None = None
    lora_alpha: float | None = None
    expert_layout: ExpertLayout | None = None
    allow_pickle: bool = False

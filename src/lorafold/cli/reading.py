"""The flags that say what the files of adapters cannot, held as they were given until a command runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adapters import ReadOptions


@dataclass(frozen=True)
class Reading:
    """`ReadOptions` before torch is imported; the same fields."""

    format: str | None = None
    lora_alpha: float | None = None
    expert_layout: Any = None
    allow_pickle: bool = False
    renames: tuple[tuple[str, str], ...] = ()

    def options(self) -> ReadOptions:
        """The options themselves."""
        from ..adapters import ReadOptions

        return ReadOptions(self.format, self.lora_alpha, self.expert_layout, self.allow_pickle, self.renames)

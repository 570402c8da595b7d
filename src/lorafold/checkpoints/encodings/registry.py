"""The table of encodings: of each family how its weights are found, in the order in which they are looked for.

A line here makes a format known, to `open_checkpoint` and to all that reads its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from .encoded import Find
from .fp8 import find_fp8


@dataclass(frozen=True)
class EncodingFormat:
    """One family: its `name`, and how its weights are found."""

    name: str
    find: Find


ENCODINGS: tuple[EncodingFormat, ...] = (EncodingFormat("FP8", find_fp8),)
"""All families. A stored tensor that one has taken is not shown to those after it."""

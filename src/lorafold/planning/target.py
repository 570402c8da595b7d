"""Where an update lands, as a value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Where an update lands.

    - `tensor`: the base tensor's name
    - `transposed`: whether it is stored (in_features, out_features)
    - `rows`: which rows (start, stop) of the tensor, seen as a matrix as it is stored, the update is for; None for all of them
    - `section`: which rows (start, stop) of ΔW, as its layer has it, land there; None for all of them
    - `why`: what decided that, where it had to be decided
    """

    tensor: str
    transposed: bool = False
    why: str = ""
    rows: tuple[int, int] | None = None
    section: tuple[int, int] | None = None

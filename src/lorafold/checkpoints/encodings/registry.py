"""The table of encodings: of each family how its weights are found, in the order in which they are looked for.

A line here makes a format known, to `open_checkpoint` and to all that reads its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .encoded import Find


@dataclass(frozen=True)
class EncodingFormat:
    """One family: its `name`, how its weights are found, and what configuration files call it.

    - `methods`: values of ``quant_method`` (or ModelOpt's ``quant_algo``) that promise tensors of this family
    """

    name: str
    find: Find
    methods: frozenset[str] = field(default_factory=frozenset)


ENCODINGS: tuple[EncodingFormat, ...] = ()
"""All families. A stored tensor that one has taken is not shown to those after it."""

REFUSED: Mapping[str, str] = {}
"""Methods that are not decoded, as ``quant_method`` has them, with the reason in words."""

"""The road that models of PEFT take: through a plan, as files do. It lies rooms above this one.

The package's root, which knows all rooms, says where; nothing here depends on what lies above.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from torch import Tensor, nn


class PeftRoad(Protocol):
    """What is done to a live model of PEFT."""

    def iter_planned(self, model: nn.Module, options: Mapping[str, Any], *, untouched: bool) -> Iterator[tuple[str, Tensor]]:
        """As `iter_merged`, with the fields of `SumOptions` as `options`."""

    def merge_own(self, model: nn.Module) -> AbstractContextManager[object]:
        """As `merged`."""


def peft_road() -> PeftRoad:
    """The road itself."""
    root = sys.modules[__name__.partition(".")[0]]
    return cast(PeftRoad, root._peft_road())

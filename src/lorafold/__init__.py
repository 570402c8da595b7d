"""Fold LoRA updates into model weights, and take them out again: exact, complete, proven.

The public names, and nothing else. Each is imported when it is first asked for: ``lorafold --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters import Adapter as Adapter
    from .adapters import WeightedAdapter as WeightedAdapter
    from .adapters import load_adapter as load_adapter
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import open_checkpoint as open_checkpoint
    from .errors import LorafoldError as LorafoldError
    from .kernel import Kept as Kept
    from .kernel import Stochastic as Stochastic
    from .kernel import merge_weight as merge_weight
    from .merging import merge as merge
    from .merging import plan as plan
    from .merging import verify as verify
    from .planning import MergeOptions as MergeOptions
    from .planning import MergePlan as MergePlan
    from .proving import Proof as Proof
    from .report import MergeReport as MergeReport
    from .update import LowRankUpdate as LowRankUpdate
    from .update import scaling_factor as scaling_factor

_HOME = {
    "adapters": ("Adapter", "WeightedAdapter", "load_adapter"),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "errors": ("LorafoldError",),
    "kernel": ("Kept", "Stochastic", "merge_weight"),
    "merging": ("merge", "plan", "verify"),
    "planning": ("MergeOptions", "MergePlan"),
    "report": ("MergeReport",),
    "update": ("LowRankUpdate", "scaling_factor"),
    "proving": ("Proof",),
}

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    for room, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f".{room}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

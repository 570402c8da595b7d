"""Fold LoRA updates into model weights, and take them out again: exact, complete, proven.

What concerns files is here; what concerns models in memory is in `lorafold.nn`; every error is in `lorafold.errors`.

::

    report = lorafold.merge("base", ["adapter"], "out")     # write base + adapter, proven, to the folder out
    proof = lorafold.verify("out", "base", ["adapter"])     # prove it again
    lorafold.unmerge("out", "restored", base="base")        # the base again, byte for byte
    lorafold.nn.attach(model, "all-linear", r=8)            # LoRA layers in a model in memory

The public names, and nothing else. Each is imported when it is first asked for: ``import lorafold`` does not wait for torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import errors as errors
    from . import nn as nn
    from .adapters.adapter import Adapter as Adapter
    from .adapters.load import load_adapter as load_adapter
    from .adapters.read_options import ReadOptions as ReadOptions
    from .api.converting import Conversion as Conversion
    from .api.converting import convert as convert
    from .api.inspecting import Inspection as Inspection
    from .api.inspecting import inspect as inspect
    from .api.live import LiveMerge as LiveMerge
    from .api.live import merge_into as merge_into
    from .api.merging import merge as merge
    from .api.merging import merge_each as merge_each
    from .api.merging import plan as plan
    from .api.running import run as run
    from .api.unmerging import UnmergeReport as UnmergeReport
    from .api.unmerging import unmerge as unmerge
    from .api.verifying import verify as verify
    from .checkpoints.checkpoint import Checkpoint as Checkpoint
    from .checkpoints.open import open_checkpoint as open_checkpoint
    from .engine.proof import Proof as Proof
    from .engine.report import MergeReport as MergeReport
    from .errors import LorafoldError as LorafoldError
    from .errors import LorafoldWarning as LorafoldWarning
    from .kernel.merge import merge_weight as merge_weight
    from .kernel.rounding import Stochastic as Stochastic
    from .kernel.stats import Kept as Kept
    from .kernel.update import LowRankUpdate as LowRankUpdate
    from .kernel.update import scaling_factor as scaling_factor
    from .options import SumOptions as SumOptions
    from .planning.plan import MergePlan as MergePlan

_HOME = {
    "": ("errors", "nn"),
    "adapters.adapter": ("Adapter",),
    "adapters.load": ("load_adapter",),
    "adapters.read_options": ("ReadOptions",),
    "api.converting": ("Conversion", "convert"),
    "api.inspecting": ("Inspection", "inspect"),
    "api.live": ("LiveMerge", "merge_into"),
    "api.merging": ("merge", "merge_each", "plan"),
    "api.running": ("run",),
    "api.unmerging": ("UnmergeReport", "unmerge"),
    "api.verifying": ("verify",),
    "checkpoints.checkpoint": ("Checkpoint",),
    "checkpoints.open": ("open_checkpoint",),
    "engine.proof": ("Proof",),
    "engine.report": ("MergeReport",),
    "errors": ("LorafoldError", "LorafoldWarning"),
    "kernel.merge": ("merge_weight",),
    "kernel.rounding": ("Stochastic",),
    "kernel.stats": ("Kept",),
    "kernel.update": ("LowRankUpdate", "scaling_factor"),
    "options": ("SumOptions",),
    "planning.plan": ("MergePlan",),
}

__all__ = ["__version__", *sorted(name for names in _HOME.values() for name in names)]  # noqa: PLE0604 - all are strings

logging.getLogger(__name__).addHandler(logging.NullHandler())  # what is logged is shown where the caller asks for it


def __getattr__(name: str) -> Any:
    for room, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f".{room}", __name__), name) if room else import_module(f".{name}", __name__)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

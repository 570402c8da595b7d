"""The outcome of a merge, as a value."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import printable
from ..kernel.stats import Kept
from ..planning.plan import MergePlan
from .proof import Proof
from .words import plural

LOW = 0.9
"""The share kept below which a merge warns."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged, how well, and how fast.

    - `kept`: by merged tensor; `nbytes`: of all tensors written
    - `seconds`: from the call to the rename; in `seconds_verifying` of them a file was proven, maybe while files were written
    - `peak_memory`: bytes, of the whole process
    - `proof`: None where it was not asked for
    - `linked`: the files of weights that are the base's own, by a second name
    - `undo`: the file that can undo it, of `undo_bytes` bytes; None where none was asked for
    """

    out: str
    plan: MergePlan
    kept: Mapping[str, Kept]
    nbytes: int
    seconds: float
    seconds_verifying: float
    peak_memory: int
    proof: Proof | None
    notes: tuple[str, ...] = ()
    undo: str | None = None
    undo_bytes: int = 0
    linked: tuple[str, ...] = ()

    @property
    def kept_in_all(self) -> float:
        """The share of the whole update that survived the rounding."""
        return sum(self.kept.values(), Kept()).share

    @property
    def clamped(self) -> dict[str, int]:
        """How many numbers were put to the largest of their dtype, by tensor; only where there are any."""
        return {name: each.clamped for name, each in self.kept.items() if each.clamped}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should act on."""
        return (*self._clamped_words(), *self._lost_words())

    def _clamped_words(self) -> tuple[str, ...]:
        clamped = self.clamped
        if not clamped:
            return ()
        most = max(clamped, key=lambda name: clamped[name])
        numbers, tensors = plural(sum(clamped.values()), "number"), plural(len(clamped), "tensor")
        return (
            f"{numbers} in {tensors} were beyond the largest of the dtype and were put to it,"
            f" most of them in {printable(most)} ({clamped[most]})",
        )

    def _lost_words(self) -> tuple[str, ...]:
        if self.kept_in_all >= LOW:
            return ()
        dtypes = sorted({step.dtype for step in self.plan.steps if step.action == "merge"})
        return (
            f"only {self.kept_in_all:.0%} of the update survived the rounding to {', '.join(dtypes)}:"
            " the merged model is closer to the base than the adapter makes it.",
            "remedies: `rounding='stochastic'` (unbiased), `dtype='float32'`, or serving the adapter unmerged",
        )

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        plan = self.plan
        return {
            "out": self.out,
            "base": plan.base,
            "adapters": [
                {"name": each.name, "path": each.path, "sha256": each.sha256, "adapter_weight": each.adapter_weight}
                for each in plan.adapters
            ],
            **asdict(plan.options),
            "tensors": {action: plan.count(action) for action in ("merge", "replace", "rows", "cast", "copy")},
            "files": len(plan.shards),
            "linked": list(self.linked),
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "seconds_verifying": self.seconds_verifying,
            "bytes_per_second": self.nbytes / max(self.seconds, 1e-9),
            "peak_memory": self.peak_memory,
            "kept": self.kept_in_all,
            "clamped": sum(self.clamped.values()),
            "clamped_by_tensor": self.clamped,
            "kept_by_tensor": {name: kept.share for name, kept in self.kept.items()},
            "undo": None if self.undo is None else {"path": self.undo, "bytes": self.undo_bytes},
            "verification": None if self.proof is None else self.proof.to_json(),
            "warnings": list(self.warnings),
            "notes": [*plan.notes, *self.notes],
        }


def peak_memory() -> int:
    """The largest resident size that this process has had, bytes.

    Linux's ru_maxrss also counts the process that started this one, up to the moment of starting; VmHWM does not.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

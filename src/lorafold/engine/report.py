"""The outcome of a merge, as a value."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError, printable
from ..kernel.stats import Kept
from ..planning.plan import Action, MergePlan, Step
from ..planning.summary import actions, left_out, title
from ..text import Readable, Summary, per_second, plural, size
from .proof import Proof

_ACTIONS: tuple[Action, ...] = ("merge", "encode", "replace", "rows", "cast", "copy")

LOW = 0.9
"""The share kept below which a merge warns."""


@dataclass(frozen=True)
class MergeReport(Readable):
    """What was merged, how well, and how fast.

    - `kept`: by merged tensor; `nbytes`: of all tensors written
    - `seconds`: from the call to the rename; in `seconds_verifying` of them a file was proven, maybe while files were written
    - `peak_memory`: bytes, of the whole process
    - `proof`: None where it was not asked for
    - `linked`: the files of weights that are the base's own, by a second name
    - `undo`: the file that can undo it, of `undo_bytes` bytes; None where none was asked for

    `str` of it is what the command line prints.

    >>> import lorafold
    >>> report = lorafold.merge("base", ["adapter"], "out")
    >>> print(report)
    base + adapter → out
      merged    tensors: 4 merged, 2 copied
      kept      ... of the update survived the rounding (exact, nearest)
      verified  6 of 6 tensors proven (100%): 4 recomputed and equal bit for bit, 2 equal byte for byte
      written   ... in 2 files, ... s, ...B/s, peak memory ...
    >>> report.proof.ok, report.warnings, report.to_json()["tensors"]["merge"]
    (True, (), 4)
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
    def kept_by_encoding(self) -> dict[str, float]:
        """The same of the weights that were written as codes again, by what people call the encoding."""
        return {encoding: kept.share for encoding, kept in _by_encoding(self.plan, self.kept).items()}

    @property
    def clamped(self) -> dict[str, int]:
        """How many numbers were put to the largest of their dtype, by tensor; only where there are any."""
        return {name: each.clamped for name, each in self.kept.items() if each.clamped}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should act on."""
        return (
            *_clamped_words(self.plan, self.clamped),
            *lost_words(self.plan, self.kept, _remedies(self.plan)),
        )

    def summary(self) -> Summary:
        """What a merge did, for people."""
        plan = self.plan
        rate = per_second(self.nbytes, self.seconds)
        written = f"{size(self.nbytes)} in {plural(len(plan.shards), 'file')}, {self.seconds:.1f} s, {rate}"
        facts = [
            *left_out(plan),
            ("merged", actions(plan)),
            ("kept", f"{self.kept_in_all:.1%} of the update survived the rounding ({plan.options})"),
            *(("kept", f"{share:.1%} of it in {printable(name)}") for name, share in self.kept_by_encoding.items()),
            ("verified", "no (`verify=False`)" if self.proof is None else self.proof.words),
            ("written", f"{written}, peak memory {size(self.peak_memory)}"),
        ]
        if self.linked:
            facts.append(("linked", f"{plural(len(self.linked), 'file')}, the base's own: whoever writes into one changes both"))
        if self.undo is not None:
            facts.append(("undo", f"{printable(self.undo)}, {size(self.undo_bytes)}"))
        facts += [("note", note) for note in (*plan.notes, *self.notes)]
        return Summary(f"{title(plan)} → {printable(self.out)}", facts, warnings=self.warnings)

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
            **plan.options.stated(),
            "left_out": {"modules": len(plan.unmatched), "names": list(plan.unmatched)},
            "tensors": {each: plan.count(each) for each in _ACTIONS if plan.count(each) or each != "encode"},
            "files": len(plan.shards),
            "linked": list(self.linked),
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "seconds_verifying": self.seconds_verifying,
            "bytes_per_second": self.nbytes / max(self.seconds, 1e-9),
            "peak_memory": self.peak_memory,
            "kept": self.kept_in_all,
            **({"kept_by_encoding": found} if (found := self.kept_by_encoding) else {}),
            "clamped": sum(self.clamped.values()),
            "clamped_by_tensor": self.clamped,
            "kept_by_tensor": {name: kept.share for name, kept in self.kept.items()},
            "undo": None if self.undo is None else {"path": self.undo, "bytes": self.undo_bytes},
            "verification": None if self.proof is None else self.proof.to_json(),
            "warnings": list(self.warnings),
            "notes": [*plan.notes, *self.notes],
        }


def _clamped_words(plan: MergePlan, clamped: Mapping[str, int]) -> tuple[str, ...]:
    coded = {step.tensor for step in plan.steps if step.action == "encode"}
    kinds = (
        (clamped.keys() - coded, "beyond the largest of the dtype", ""),
        (
            clamped.keys() & coded,
            "far beyond the largest that the scale of their block can state",
            "; `output_format='bf16'` holds them",
        ),
    )
    found = []
    for names, words, remedy in kinds:
        if names:
            most = max(sorted(names), key=lambda name: clamped[name])
            numbers, tensors = plural(sum(clamped[name] for name in names), "number"), plural(len(names), "tensor")
            where = f"most of them in {printable(most)} ({clamped[most]})"
            found.append(f"{numbers} in {tensors} were {words} and were put to it, {where}{remedy}")
    return tuple(found)


def lost_words(plan: MergePlan, kept: Mapping[str, Kept], remedies: str) -> tuple[str, ...]:
    """A warning and the `remedies`, where less than `LOW` of the update survived the rounding; else nothing.

    What was rounded at random is not counted: nothing of it is lost, but on so few numbers that chance shows.
    """
    at_random = {step.tensor for step in plan.steps if step.action == "encode" and plan.options.code_rounding == "stochastic"}
    share = sum((each for name, each in kept.items() if name not in at_random), Kept()).share
    if share >= LOW:
        return ()
    kinds = sorted({_kind(step) for step in plan.steps if step.action in ("merge", "encode") and step.tensor not in at_random})
    return (
        f"only {share:.0%} of the update survived the rounding to {printable(', '.join(kinds))}:"
        " the merged model is closer to the base than the adapter makes it.",
        f"remedies: {remedies}, or serving the adapter unmerged",
    )


def _kind(step: Step) -> str:
    return step.dtype if step.coded is None or step.action != "encode" else step.coded.encoding


def _remedies(plan: MergePlan) -> str:
    wider = "`output_format='fp32'`" if plan.options.output_format else "`dtype='float32'`"
    return f"`rounding='stochastic'` (unbiased), {wider}"


def _by_encoding(plan: MergePlan, kept: Mapping[str, Kept]) -> dict[str, Kept]:
    found: dict[str, Kept] = {}
    for step in plan.steps:
        if step.action == "encode":
            found[_kind(step)] = found.get(_kind(step), Kept()) + kept.get(step.tensor, Kept())
    return found


LEAST = 0.5
"""The share kept below which codes to nearest are refused."""


def check_codes(plan: MergePlan, kept: Mapping[str, Kept]) -> None:
    """Raises `PlanError` where codes to nearest keep too little of the update for the output to be of any use."""
    if plan.options.code_rounding != "nearest":
        return
    for encoding, found in _by_encoding(plan, kept).items():
        if found.share < LEAST:
            raise PlanError(
                f"only {found.share:.0%} of the update would survive the rounding to the nearest codes of {printable(encoding)}:"
                " the output would be the base, but for the name",
                hint="nothing was written; `rounding='stochastic'` keeps it, `output_format='bf16'` too",
            )


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

"""A plan as people read it: what is merged into what, and each kind of tensor with its scaling and why."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from ..errors import printable
from ..files.safetensors.info import BITS
from ..text import Summary, Table, plural, size

if TYPE_CHECKING:
    from .plan import Addend, Coded, MergePlan, Step

_WORDS = {
    "merge": "merged",
    "encode": "merged into their codes",
    "replace": "replaced",
    "rows": "changed in rows",
    "cast": "cast",
    "copy": "copied",
}


def plan_summary(plan: MergePlan, *, everything: bool = False) -> Summary:
    """What a merge would do: grouped by kind of module, or with `everything` tensor by tensor."""
    what = f"{actions(plan)}; {size(plan.nbytes)} in {plural(len(plan.shards), 'file')}; {plan.options}"
    return Summary(
        title(plan),
        [
            *left_out(plan),
            ("", what),
            *(("adapter", f"{printable(each.name)}, in the format {each.format}") for each in plan.adapters),
        ],
        _tensors(plan) if everything else _groups(plan),
        [
            *(("config", f"{printable(field)} becomes {value!r}") for field, value in plan.config.items()),
            *(("config", f"{printable(field)} goes") for field in plan.dropped),
            *(("note", note) for note in plan.notes),
        ],
    )


def title(plan: MergePlan) -> str:
    """Base and adapters, with the weights that are not 1."""
    names = (printable(a.name) + (f"@{a.adapter_weight:g}" if a.adapter_weight != 1 else "") for a in plan.adapters)
    return " + ".join([printable(plan.base), *names])


def actions(plan: MergePlan) -> str:
    """How many tensors come about in which way."""
    counts = {word: plan.count(action) for action, word in _WORDS.items()}  # type: ignore[arg-type]
    return "tensors: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "merged")


def left_out(plan: MergePlan) -> list[tuple[str, str]]:
    """How much of the adapters is in no tensor, where that was allowed, as a fact to show; none where all of it is merged."""
    if not plan.unmatched:
        return []
    placed = {(addend.adapter, addend.module) for step in plan.steps for addend in step.addends}
    whole = sum((step.replacement is not None) + len(step.rows) for step in plan.steps)
    total = plural(len(placed) + whole + len(plan.unmatched), "module")
    return [("left out", f"{len(plan.unmatched)} of {total} of the adapters: the base has no place for them")]


def kind_of(name: str) -> str:
    """A name with its numbers of layers and experts left open, so that equal ones fall together.

    >>> kind_of("model.layers.17.mlp.experts[3]")
    'model.layers.*.mlp.experts[*]'
    """
    parts = ("*" if part.isdigit() else part for part in name.split("."))
    return printable(re.sub(r"\[\d+\]$", "[*]", ".".join(parts)))


def _tensors(plan: MergePlan) -> Table:
    rows = [(s.tensor, s.action, str(list(s.shape)), s.dtype, _how(plan, s)) for s in plan.steps]
    return Table(("tensor", "action", "shape", "dtype", "how"), rows)


def _groups(plan: MergePlan) -> Table:
    groups: Counter[tuple[str, ...]] = Counter()
    for step in plan.steps:
        if step.action != "copy":
            groups[(kind_of(step.tensor), step.action, str(list(step.shape)), step.dtype, _how(plan, step))] += 1
    rows = [(str(count), *row) for row, count in groups.items()]
    return Table(("", "tensors", "action", "shape", "dtype", "how"), rows, (0,))


def _how(plan: MergePlan, step: Step) -> str:
    """The updates of a tensor, equal ones once: those of experts."""
    found = Counter(_addend(plan, addend) for addend in step.addends)
    coded = [] if step.coded is None else [_coded(step, step.coded)]
    return "; ".join([*coded, *(text if count == 1 else f"{text}, {count} times" for text, count in found.items())])


def _coded(step: Step, coded: Coded) -> str:
    """What a quantised weight is stored as, and what becomes of it."""
    now = math.prod(step.shape) * BITS[step.dtype] // 8
    became = ", codes anew" if step.action == "encode" else f", {size(coded.nbytes)} to {size(now)}" if coded.nbytes != now else ""
    return f"{printable(coded.encoding)}{became}"


def _addend(plan: MergePlan, addend: Addend) -> str:
    name = f"{printable(plan.adapters[addend.adapter].name)}: " if len(plan.adapters) > 1 else ""
    return f"{name}× {addend.scaling:.6g} ({addend.why})" + (", transposed" if addend.transposed else "")

"""Plans, reports, proofs and inspections as text for people: readable without colour, at any width, in a pipe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..engine.proof import Proof
from ..engine.report import MergeReport
from ..engine.words import per_second, plural, size
from ..errors import printable, printable_lines
from ..planning.plan import MergePlan, Step
from ..planning.shards import nbytes
from .hints import in_flags


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _UNLIMITED  # a table in a pipe is for grep: no name is cut in two
    return console


_UNLIMITED = 10_000


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _lines(lines: Sequence[str], style: str | None = None) -> None:
    console = _console()
    for line in lines:
        console.print(printable_lines(in_flags(line)), markup=False, style=style)


def show_report(report: MergeReport) -> None:
    """Print what a merge did."""
    plan = report.plan
    _lines([f"{_title(plan)} → {printable(report.out)}"], "bold")
    rows = [
        ("merged", _actions(plan)),
        ("kept", f"{report.kept_in_all:.1%} of the update survived the rounding ({_rounding(plan)})"),
        ("verified", _proven(report.proof) if report.proof is not None else "no (--no-verify)"),
        ("written", f"{size(report.nbytes)} in {plural(len(plan.shards), 'file')}, {report.seconds:.1f} s,"
                    f" {per_second(report.nbytes, report.seconds)}, peak memory {size(report.peak_memory)}"),
    ]  # fmt: skip
    if report.linked:
        rows.append(("linked", f"{plural(len(report.linked), 'file')}, the base's own: whoever writes into one changes both"))
    if report.undo is not None:
        rows.append(("undo", f"{printable(report.undo)}, {size(report.undo_bytes)}"))
    _lines([f"  {name:<9} {text}" for name, text in rows])
    _lines([f"  note      {note}" for note in (*plan.notes, *report.notes)])
    _lines([f"warning: {warning}" for warning in report.warnings], "yellow")


def show_plan(plan: MergePlan, *, everything: bool = False) -> None:
    """Print what a merge would do: grouped by kind of module, or every tensor."""
    _lines([_title(plan)], "bold")
    total = sum(nbytes(step) for step in plan.steps)
    _lines([f"  {_actions(plan)}; {size(total)} in {plural(len(plan.shards), 'file')}; {_rounding(plan)}"])
    _lines([f"  adapter   {printable(each.name)}, in the format {each.format}" for each in plan.adapters])
    if everything:
        rows = [
            (
                printable(step.tensor),
                step.action,
                str(list(step.shape)),
                printable(step.dtype),
                _how(plan, step),
            )
            for step in plan.steps
        ]
        _console().print(_table(("tensor", "action", "shape", "dtype", "how"), rows))
    else:
        groups: Counter[tuple[str, ...]] = Counter()
        for step in plan.steps:
            if step.action != "copy":
                how = _how(plan, step)
                groups[(_kind(step.tensor), step.action, str(list(step.shape)), step.dtype, how)] += 1
        _console().print(
            _table(("", "tensors", "action", "shape", "dtype", "how"), [(str(n), *row) for row, n in groups.items()], (0,))
        )
    for field, value in plan.config.items():
        _lines([f"  config    {printable(field)} becomes {value!r}"])
    _lines([f"  note      {note}" for note in plan.notes])


def show_proof(proof: Proof, out: str, *, replayed: bool = True) -> None:
    """Print what a proof found; `replayed`: from base and adapters, not by the hashes in the receipt."""
    is_what = "what base and adapters say it must be" if replayed else "as it was written, by the hashes in its receipt"
    _lines([f"{printable(out)} is {is_what}"], "bold")
    _lines([f"  verified  {_proven(proof)}"] if replayed else [])
    _lines([f"  read      {size(proof.nbytes)} in {plural(len(proof.files), 'file')}"])


def show_inspection(inspection: dict[str, Any], *, everything: bool = False) -> None:
    """Print what an adapter or a checkpoint is."""
    if inspection["kind"] == "adapter":
        _show_adapter(inspection, everything)
    else:
        _show_checkpoint(inspection, everything)


def _show_adapter(adapter: dict[str, Any], everything: bool) -> None:
    modules = adapter["modules"]
    base = printable(adapter["base_model"]) if adapter["base_model"] else "not stated"
    _lines([f"{printable(adapter['name'])}, a LoRA adapter in the format {adapter['format']}"], "bold")
    _lines([
        f"  base      {base}",
        f"  holds     {plural(len(modules), 'module')}, {plural(len(adapter['replacements']), 'replaced tensor')},"
        f" {size(adapter['bytes'])}",
        f"  ‖ΔW‖      {adapter['norm']:.6g} in all",
    ])  # fmt: skip
    if everything:
        rows = [(printable(name), *_scaling(m), f"{m['norm']:.4g}") for name, m in modules.items()]
        _console().print(_table(("module", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (3, 4, 6)))
    else:
        groups: dict[tuple[str, ...], list[float]] = {}
        for name, m in modules.items():
            groups.setdefault((_kind(name), *_scaling(m)), []).append(m["norm"])
        rows = [(str(len(norms)), *row, _range(norms)) for row, norms in groups.items()]
        _console().print(_table(("", "modules", "ΔW", "dtype", "r", "scaling", "why", "‖ΔW‖"), rows, (0, 4, 5, 7)))
    for name, info in adapter["replacements"].items():
        _lines([f"  replaces  {printable(name)} {info['shape']} {info['dtype']}"])
    for name, indices in adapter["rows"].items():
        _lines([f"  rows      {len(indices)} of {printable(name)}"])
    _lines([f"  note      {note}" for note in adapter["notes"]])


def _show_checkpoint(checkpoint: dict[str, Any], everything: bool) -> None:
    kind = f", a {printable(str(checkpoint['model_type']))} model" if checkpoint["model_type"] else ", a checkpoint"
    _lines([f"{printable(checkpoint['name'])}{kind}"], "bold")
    dtypes = ", ".join(f"{count:,} {printable(dtype)}" for dtype, count in checkpoint["parameters_by_dtype"].items())
    _lines([f"  holds     {plural(len(checkpoint['tensors']), 'tensor')}, {dtypes} parameters, {size(checkpoint['bytes'])}"])
    _lines([f"  file      {printable(name)}, {size(count)}" for name, count in checkpoint["files"].items()])
    receipt = checkpoint["receipt"]
    for adapter in receipt["adapters"] if receipt else ():
        name, sha256 = printable(adapter["name"]), printable(adapter["sha256"][:12])
        _lines([f"  merged    {name} at weight {adapter['adapter_weight']:g}, {sha256}…"])
    if everything:
        rows = [
            (printable(n), str(t["shape"]), printable(t["dtype"]), printable(t["file"])) for n, t in checkpoint["tensors"].items()
        ]
        _console().print(_table(("tensor", "shape", "dtype", "file"), rows))


def _title(plan: MergePlan) -> str:
    names = (printable(a.name) + (f"@{a.adapter_weight:g}" if a.adapter_weight != 1 else "") for a in plan.adapters)
    return " + ".join([printable(plan.base), *names])


def _rounding(plan: MergePlan) -> str:
    return str(plan.options)


def _actions(plan: MergePlan) -> str:
    words = {"merge": "merged", "replace": "replaced", "rows": "changed in rows", "cast": "cast", "copy": "copied"}
    counts = {word: plan.count(action) for action, word in words.items()}  # type: ignore[arg-type]
    return "tensors: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "merged")


def _proven(proof: Proof) -> str:
    whole = sum(tensor.proven for tensor in proof.tensors.values())
    merged = proof.count("merge")
    return (
        f"{whole} of {len(proof.tensors)} tensors proven ({proof.share:.0%}): {merged} recomputed and equal bit for bit,"
        f" {whole - merged} equal byte for byte"
    )


def _how(plan: MergePlan, step: Step) -> str:
    """The updates of a tensor, equal ones once: those of experts."""
    found = Counter(_addend(plan, addend) for addend in step.addends)
    return "; ".join(text if count == 1 else f"{text}, {count} times" for text, count in found.items())


def _addend(plan: MergePlan, addend: Any) -> str:
    name = f"{printable(plan.adapters[addend.adapter].name)}: " if len(plan.adapters) > 1 else ""
    return f"{name}× {addend.scaling:.6g} ({addend.why})" + (", transposed" if addend.transposed else "")


def _scaling(module: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(module["shape"]),
        module["dtype"],
        str(module["r"]),
        f"{module['scaling']:.6g}",
        module["why"] + (", then DoRA" if module["dora"] else ""),
    )


def _kind(name: str) -> str:
    """A name with its numbers of layers and experts left open, so that equal ones fall together."""
    parts = ("*" if part.isdigit() else part for part in name.split("."))
    return printable(re.sub(r"\[\d+\]$", "[*]", ".".join(parts)))


def _range(norms: Sequence[float]) -> str:
    low, high = f"{min(norms):.4g}", f"{max(norms):.4g}"
    return low if low == high else f"{low} to {high}"

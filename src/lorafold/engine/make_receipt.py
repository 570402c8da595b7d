"""The receipt of a merge, made from its plan, and an old one held against a proof."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.receipt import RECEIPT_NAME, MergedAdapter, Receipt, receipt_of
from ..errors import printable
from ..files.digests import algorithm_of
from ..kernel.stats import Kept
from ..planning.plan import Addend, MergePlan, Step
from ..version import __version__
from .proof import Proof

_MEASURED = 1e-3
"""kept is a sum in float32, in an order that depends on the machine: three digits of it are compared."""


def make_receipt(
    plan: MergePlan,
    checkpoint: Checkpoint,
    kept: Mapping[str, Kept],
    files: Mapping[str, str],
    beside: Mapping[str, str] | None = None,
) -> Receipt:
    """What `plan`, carried out on `checkpoint`, made.

    `files` and `beside`: hashes by name, of its files of weights and of those beside them, the latter sha256.
    """
    return Receipt(
        version=__version__,
        base={
            "name": checkpoint.name,
            "fingerprint": plan.fingerprint,
            **({} if plan.original is None else {"original": plan.original.fingerprint}),
        },
        adapters=(
            *_earlier(checkpoint),
            *(MergedAdapter(a.name, a.sha256, a.adapter_weight, a.format, a.base_model, a.left_out) for a in plan.adapters),
        ),
        options=plan.options,
        tensors={step.tensor: _entry(step, plan, kept) for step in plan.steps if step.action != "copy"},
        kept=sum(kept.values(), Kept()).share,
        files=files,
        beside=beside or {},
        unmatched=plan.unmatched,
        clamped=sum(each.clamped for each in kept.values()),
    )


def receipt_failures(
    receipt: Receipt, plan: MergePlan, checkpoint: Checkpoint, proof: Proof, beside: Mapping[str, str], tensors: Mapping[str, str]
) -> list[str]:
    """Where `receipt` says other than `plan` and `proof`, in words. Names of folders and the version may differ.

    `beside`: sha256 of the output's files beside the weights, by name; `tensors`: of its tensors, where the receipt has them.
    """
    wanted = replace(make_receipt(plan, checkpoint, proof.kept, proof.files, beside), tensor_hashes=tensors)
    return [f"{RECEIPT_NAME}: {failure}" for failure in _failures(receipt, wanted)]


def _failures(found: Receipt, wanted: Receipt) -> Iterator[str]:
    if found.base.get("fingerprint") != wanted.base["fingerprint"]:
        yield "its fingerprint is of a base with other files or tensors"
    if found.base.get("original") != wanted.base.get("original"):
        yield "the original that codes were made of has another fingerprint"
    if found.base.keys() != wanted.base.keys():
        yield f"what it says of the base should be its {' and its '.join(wanted.base)}"
    listed, given = (sorted((a.sha256, a.adapter_weight) for a in receipt.adapters) for receipt in (found, wanted))
    names = {adapter.sha256: adapter.name for receipt in (found, wanted) for adapter in receipt.adapters}
    for sha256, weight in given:
        if (sha256, weight) not in listed:
            yield f"it does not list the adapter {printable(names[sha256])} at weight {weight:g}"
    for sha256, weight in listed:
        if (sha256, weight) not in given:
            yield f"it lists the adapter {printable(names[sha256])} at weight {weight:g}, which was not given"
    if len(listed) != len(given):
        yield f"it lists {len(listed)} adapters, and {len(given)} were merged"
    known = {(adapter.sha256, adapter.adapter_weight): adapter for adapter in wanted.adapters}
    for adapter in found.adapters:
        other = known.get((adapter.sha256, adapter.adapter_weight))
        if other is not None and replace(adapter, name=other.name) != other:
            yield f"what it says of the adapter {printable(adapter.name)} is not what there is to say"
    for name in found.tensors.keys() | wanted.tensors.keys():
        if not _same(_comparable(found.tensors.get(name)), _comparable(wanted.tensors.get(name))):
            yield f"what it says of {printable(name)} is not what was done"
    if sorted(found.unmatched) != sorted(wanted.unmatched):
        yield "what it says was left out of the adapters is not what was"
    if found.clamped != wanted.clamped:
        yield f"{found.clamped} numbers are said to be clamped, found {wanted.clamped}"
    if not _same(found.kept, wanted.kept):
        yield f"kept is {found.kept}, measured {wanted.kept:.6g}"
    for name in (found.files.keys() | wanted.files.keys()) if found.files else ():
        if found.files.get(name) != wanted.files.get(name):
            yield f"its {algorithm_of(found.files.get(name, ''))} of {printable(name)} is not that of the file"
    for name in sorted(found.beside.keys() | wanted.beside.keys()):
        if found.beside.get(name) != wanted.beside.get(name):
            yield f"its sha256 of {printable(name)} is not that of the file"
    for name in found.tensor_hashes.keys() | wanted.tensor_hashes.keys():
        if found.tensor_hashes.get(name) != wanted.tensor_hashes.get(name):
            yield f"its sha256 of the tensor {printable(name)} is not that of its bytes"


def _earlier(checkpoint: Checkpoint) -> tuple[MergedAdapter, ...]:
    receipt = receipt_of(checkpoint)
    return receipt.adapters if receipt is not None else ()


def _entry(step: Step, plan: MergePlan, kept: Mapping[str, Kept]) -> dict[str, Any]:
    entry: dict[str, Any] = {"action": step.action}
    if step.coded is not None:
        entry["encoding"] = step.coded.encoding
    if step.addends:
        entry["updates"] = [_update(addend, plan) for addend in step.addends]
        entry["kept"] = kept.get(step.tensor, Kept()).share
    if clamped := kept.get(step.tensor, Kept()).clamped:
        entry["clamped"] = clamped
    if step.rows:
        entry["rows"] = [
            {"adapter": plan.adapters[new.adapter].sha256, "indices": list(new.indices), "tensor": new.values} for new in step.rows
        ]
    if step.adapter is not None:
        entry["replaced_by"] = plan.adapters[step.adapter].sha256
        entry["tensor"] = step.replacement
    return entry


def _update(addend: Addend, plan: MergePlan) -> dict[str, Any]:
    return {
        "adapter": plan.adapters[addend.adapter].sha256,
        "module": addend.module,
        "part": addend.part,
        "scaling": addend.scaling,
        "why": addend.why,
        "tensors": list(addend.stored),
        **({} if addend.rows is None else {"rows": list(addend.rows)}),
        **({} if addend.section is None else {"section": list(addend.section)}),
        **({} if addend.columns is None else {"columns": list(addend.columns)}),
    }


def _comparable(entry: Any) -> Any:
    """An entry of a tensor with its updates in an order that does not depend on that of the adapters."""
    updates = entry.get("updates") if isinstance(entry, Mapping) else None
    if not isinstance(updates, list):
        return entry
    return {**entry, "updates": sorted(updates, key=repr)}


def _same(found: Any, wanted: Any) -> bool:
    """Equality, but for `kept`, which is measured."""
    if isinstance(wanted, float) and type(found) in (int, float):
        return math.isclose(found, wanted, rel_tol=_MEASURED, abs_tol=_MEASURED)
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return found.keys() == wanted.keys() and all(
            _same(found[key], wanted[key]) if key == "kept" else bool(found[key] == wanted[key]) for key in wanted
        )
    return type(found) is type(wanted) and bool(found == wanted)

"""One table of what PEFT can put on a module: built by PEFT, all that it trains perturbed, saved, merged from the files.

Each case says the formula of every tensor that must change (`peft_formulas`), with its factor as a number; the rest must be the
base's, byte for byte. In `exact` the merged tensors are the formula rounded once, in `fast` within one step of it; and the merged
model, in float64, answers as PEFT's own does unmerged. `bug` names the cases in which PEFT's merge is not its forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorafold
from models import different
from peft_cases import CASES, build, loaded, unmerged


@pytest.mark.parametrize("name", CASES)
def test_merged_is_the_formula_and_answers_as_the_unmerged_model(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base, held, adapter, own = build(case, tmp_path)
    wanted = dict(held)
    for tensor, formula in case.changed.items():
        wanted[tensor] = formula(held, own, tensor).rounded(case.dtype)
        assert not torch.equal(wanted[tensor], held[tensor]), tensor

    report = lorafold.merge(base, [adapter], tmp_path / "exact")
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    if case.dtype == torch.float64:  # the formulas' own numbers are no wider
        assert all(torch.allclose(exact[each], wanted[each], rtol=2.0**-49, atol=2.0**-49) for each in wanted)
    else:
        assert different(exact, wanted) == {}
    assert report.proof is not None
    assert report.proof.share == 1.0
    assert {step.tensor for step in report.plan.steps if step.action != "copy"} == set(case.changed)

    fast = lorafold.merge(base, [adapter], tmp_path / "fast", precision="fast")
    found = load_file(tmp_path / "fast" / "model.safetensors")
    for tensor in wanted:
        if tensor not in case.changed or case.dtype in (torch.bfloat16, torch.float16):
            assert within_one_step(found[tensor], wanted[tensor]), tensor
        else:  # the sum itself is in float32, of 4 products and the weight: 6 roundings of what stands there by then
            bound = 6 * 2.0**-24 * case.changed[tensor](held, own, tensor).size()
            assert ((found[tensor].double() - wanted[tensor].double()).abs() <= bound).all(), tensor
    assert fast.proof is not None

    lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F64")
    with torch.no_grad():
        right = unmerged(case, held, adapter)(7)
        answer = loaded(case, load_file(tmp_path / "wide" / "model.safetensors"), torch.float64)(7)
    # float64 sums of some tens of numbers below 10 in size. What PEFT takes out it computes in float32: what is left is then off by
    # some 2⁻²³ of the largest singular value, below 10 too, times some 10 for what a matrix of this size may lose; where it is
    # rounded to halves, next to all numbers come out the same
    limit = 1e-5 if case.decomposed else 1e-12
    assert (answer - right).norm() / right.norm() < limit


def within_one_step(found: Tensor, wanted: Tensor) -> bool:
    up, down = (torch.nextafter(wanted, torch.full_like(wanted, end)) for end in (torch.inf, -torch.inf))
    return bool(((found >= down) & (found <= up)).all())


def test_the_table_is_as_large_as_it_should_be() -> None:
    assert len(CASES) >= 40

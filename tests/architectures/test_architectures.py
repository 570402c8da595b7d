"""The models people use, tiny and random: what plain transformers computes with the merged files is what PEFT computes unmerged.

Each base is written by transformers, each adapter by PEFT, with random numbers on all linear layers and on the experts. Some
families are written under other names than their modules have, with experts one by one where the module holds a stack, or the
reverse; nothing here says which.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorafold
from architectures.zoo import ARCHITECTURES, adapted, built, outputs, plainly, relative, saved


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path: Path, name: str) -> None:
    """In float64 a merged weight is off by one rounding, 2⁻⁵³ of its size; what is allowed beside that is for the parts of models
    that transformers computes in float32 whatever the weights are: norms, rotations, routers, softmax.
    """
    architecture = ARCHITECTURES[name]
    model = built(architecture)
    before = outputs(model, architecture)
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, architecture)
    saved(wrapped, tmp_path / "adapter")
    wanted = outputs(wrapped, architecture)
    assert relative(before, wanted) > 0.05  # the adapter does something

    report = lorafold.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert report.proof is not None
    merged = plainly(type(model).from_pretrained(tmp_path / "out", dtype=torch.float64))
    assert relative(outputs(merged, architecture), wanted) < 1e-6

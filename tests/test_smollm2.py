"""A real model, SmolLM2-135M, and an adapter of PEFT on it: the bits of PEFT's merge, but for where it rounds twice."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorafold
from models import different, peft_edits, tensors
from oracle import correctly_rounded, same_bits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(demo: Path) -> Path:
    return demo / "base"


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """PEFT's updates by tensor, PEFT's merged weights, and the adapter's folder. lora_A and lora_B are float32."""
    import peft
    import transformers

    adapter = tmp_path_factory.mktemp("smollm2") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        wrapped = peft.get_peft_model(model, config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.01)
        wrapped.save_pretrained(adapter)
        updates, _ = peft_edits(wrapped)
        whole = wrapped.merge_and_unload().state_dict()
    return updates, {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}, adapter


def differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By tensor, where the bits differ."""
    assert found.keys() == wanted.keys()
    places = {name: (found[name].view(torch.int16) != wanted[name].view(torch.int16)).nonzero() for name in found}
    return {name: where for name, where in places.items() if len(where)}


Weights = Mapping[str, Tensor]


def explained(places: Weights, found: Weights, other: Weights, base: Weights, updates: Any) -> bool:
    """Whether the two differ only where the real sum is as near to a tie of bfloat16 as float32 cannot tell.

    A float32 sum of W and r = 8 products is off by at most 10 · 2⁻²⁴ of the sum of their sizes. Where it falls on the other side
    of a tie, or onto it, the real sum is no further from the tie than that.
    """
    for name, where in places.items():
        (rows, columns), update, weight = where.T, updates[name][0], base[name].double()
        products = update.scaling * update.lora_B.double()[rows] * update.lora_A.double()[:, columns].T  # (n, r)
        real = weight[rows, columns] + products.sum(dim=1)
        size = weight[rows, columns].abs() + products.abs().sum(dim=1)
        tie = (found[name].double()[rows, columns] + other[name].double()[rows, columns]) / 2
        if not bool(((real - tie).abs() <= 10 * 2.0**-24 * size).all()):
            return False
    return True


def test_fast_is_pefts_merge_but_for_double_rounding(base: Path, merged: Any, tmp_path: Path) -> None:
    updates, peft_weights, adapter = merged
    lorafold.merge(base, [adapter], tmp_path / "fast", precision="fast", verify=False)
    before, fast = tensors(base), tensors(tmp_path / "fast")
    places = differing(fast, peft_weights)  # on most machines none: both sum in float32
    assert places.keys() <= updates.keys()
    assert explained(places, fast, peft_weights, before, updates)
    assert sum(len(where) for where in places.values()) <= 2.0**-15 * sum(before[name].numel() for name in updates)


def test_exact_has_every_bit_of_the_oracle(base: Path, merged: Any, tmp_path: Path) -> None:
    updates, peft_weights, adapter = merged
    report = lorafold.merge(base, [adapter], tmp_path / "exact")
    before, exact = tensors(base), tensors(tmp_path / "exact")
    assert report.proof is not None
    assert report.proof.share == 1
    untouched = before.keys() - updates.keys()
    assert different({n: exact[n] for n in exact.keys() - updates.keys()}, {n: before[n] for n in untouched}) == {}
    for name, (update,) in updates.items():
        if ".layers.29." in name:
            assert same_bits(exact[name], correctly_rounded(before[name], [update], torch.bfloat16)), name
        assert rounded(exact[name], before[name].double() + update.dense(torch.float64)), name
    # Where PEFT's weights differ, it is its second rounding that is off: a float32 sum lands on a tie of bfloat16, which happens to
    # one element in 2¹⁶, and goes the wrong way half the time.
    places = differing(exact, peft_weights)
    count = sum(len(where) for where in places.values())
    assert 0 < count <= 2.0**-15 * sum(before[name].numel() for name in updates)
    assert explained(places, exact, peft_weights, before, updates)


def rounded(found: Tensor, total: Tensor) -> bool:
    """Whether `found` is `total`, which is off by some 2⁻⁵⁰ of its size, rounded to nearest."""
    value = found.double()
    step = torch.ldexp(torch.ones_like(total), torch.frexp(value).exponent - 8)
    return bool(((value - total).abs() <= step / 2 * (1 + 2.0**-30)).all())

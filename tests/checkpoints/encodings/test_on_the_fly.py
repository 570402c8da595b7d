"""What training saw of a base that it loaded in four or eight bits: against bitsandbytes' own code, in golden files."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lorafold.checkpoints.encodings.encoded import Read
from lorafold.checkpoints.encodings.on_the_fly import dynamic_map, on_the_fly, with_its_mean
from lorafold.files.evaluation import evaluate, footprint, rows_of
from lorafold.files.expression import Permuted, narrow
from lorafold.files.safetensors.info import NAMES, TensorInfo

GOLDEN = sorted((Path(__file__).parent / "golden" / "loaded").glob("*.safetensors"))
KINDS = ("nf4", "nf4-single", "fp4", "int8")


def stored(weight: Tensor) -> tuple[TensorInfo, Read]:
    """`weight` as if it were in a file, and what reads it there."""
    info = TensorInfo("w", NAMES[weight.dtype], tuple(weight.shape), 0, weight.nbytes, Path("file"))
    flat = weight.contiguous().view(-1)
    return info, lambda part: flat[part.start // weight.itemsize : part.stop // weight.itemsize].view(part.shape)


def test_there_are_files_of_each_kind() -> None:
    assert {path.stem.rpartition("-")[0].rpartition("-")[0] for path in GOLDEN} == {*KINDS}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_numbers_are_the_vendors(path: Path) -> None:
    """The same bits of what is rounded once; of int8 the vendor rounds thrice to float32, less than 3.1 · 2⁻²⁴ in all."""
    with safe_open(path, "pt") as file:
        kind, weight, vendors = file.metadata()["kind"], file.get_tensor("weight"), file.get_tensor("expected")
        info, read = stored(weight)
        numbers = evaluate(on_the_fly(info, kind, file.metadata()["loaded"]).decoded, read)
    assert numbers.shape == vendors.shape
    if kind == "int8":
        assert numbers.dtype == torch.float64
        assert bool(((numbers - vendors.double()).abs() <= numbers.abs() * 3.1 * 2.0**-24).all())
    else:
        assert numbers.dtype == vendors.dtype
        assert torch.equal(numbers, vendors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(190, 96), (3, 20000), (5, 7)])
def test_rows_are_those_of_the_whole(kind: str, shape: tuple[int, int]) -> None:
    """Whatever rows are made at a time, and either way round; blocks straddle rows, and their mean is of the whole tensor."""
    torch.manual_seed(3)
    weight = (torch.randn(shape) * 0.05).bfloat16()
    weight[0] = 0
    info, read = stored(weight)
    decoded = on_the_fly(info, kind, "BF16").decoded
    whole, known = evaluate(decoded, read), with_its_mean(decoded, read)
    assert torch.equal(evaluate(known, read), whole)
    for start, count in ((0, 1), (shape[0] // 3, shape[0] // 2), (shape[0] - 1, 1)):
        rows = rows_of(known, start, count, shape[1])
        assert torch.equal(evaluate(rows, read), whole[start : start + count])
        assert footprint(rows) < footprint(known) or shape[0] < 9
    info, read = stored(weight.T.contiguous())
    turned = on_the_fly(info, kind, "BF16", transposed=True).decoded
    assert isinstance(turned, Permuted)
    assert torch.equal(evaluate(turned, read), whole.T)
    assert torch.equal(evaluate(narrow(with_its_mean(turned, read), 0, 1, 4), read), whole.T[1:5])


def test_the_mean_is_the_exact_one_rounded_once() -> None:
    torch.manual_seed(4)
    weight = torch.randn(64, 1000)
    info, read = stored(weight)
    largest = np.abs(weight.numpy().reshape(-1, 64)).max(1)
    mean = with_its_mean(on_the_fly(info, "nf4", "F32").decoded, read).of.mean  # type: ignore[union-attr]
    assert mean.values == (float(np.float32(math.fsum(map(float, largest)) / largest.size)),)


def test_the_map_of_eight_bits_is_the_vendors() -> None:
    """sha256 of ``bitsandbytes.functional.create_dynamic_map()`` of 0.50.2."""
    digest = hashlib.sha256(np.array(dynamic_map(), np.float32).tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind: str) -> None:
    """So that whoever adds to it finds it."""
    for value in (math.nan, math.inf):
        weight = torch.ones(4, 96)
        weight[2, 5] = value
        info, read = stored(weight)
        assert not bool(evaluate(on_the_fly(info, kind, "BF16").decoded, read)[2, 5].isfinite())

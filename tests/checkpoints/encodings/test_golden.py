"""Against the vendors: what their own code made of weights, in files that ``scripts/make_golden_encodings.py`` wrote.

A vendor computes in its own type. Where it rounds once, its bits are those of the decoded number rounded once; where it rounds
twice, the two are within the sum of the roundings.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from encoded_files import assert_rows, assert_written, found_in
from lorafold.files.safetensors.header import read_header
from lorafold.kernel.rounding import to_nearest

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half the distance to the next number as a share of a number; for bfloat16 twice that, which leaves room for float32's."""

TWICE = {"bitsandbytes-int8": 2.0, "compressed-nvfp4": 1.0, "hqq": 3.0}
"""What rounds twice, with how many units (of the type that the vendor returns) its result is off, at most.

- bitsandbytes int8: fl(fl(q · SCB) · fl(1/127)), three roundings to float32, of which the first is exact up to 2⁻²⁴: 3 u + …, less
  than 3.1 · 2⁻²⁴, and the vendor's own claim is 1.1 ulp ≤ 2.2 u
- NVFP4: fl(s/g) and the product in float32, then bfloat16: 2⁻⁹ + 2 · 2⁻²⁴ < 2⁻⁸
- HQQ: fl(q − zero) and the product in float32: 2 u + u²
"""


def twice(name: str) -> float | None:
    return next((units for start, units in TWICE.items() if name.startswith(start)), None)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_decoded_weights_are_the_vendors(path: Path, tmp_path: Path) -> None:
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = {name.removeprefix("stored."): tensor for name, tensor in held.items() if name.startswith("stored.")}
    expected = {name.removeprefix("expected."): tensor for name, tensor in held.items() if name.startswith("expected.")}
    found = found_in(tmp_path, None, stored, config)
    assert found.encoded.keys() == expected.keys()
    assert {name for each in found.encoded.values() for name in each.stored} == stored.keys()
    for name, vendors in expected.items():
        numbers = found.numbers(found.encoded[name].decoded)
        assert numbers.shape == vendors.shape
        units = twice(path.stem)
        if units is None:
            assert torch.equal(to_nearest(numbers, vendors.dtype), vendors)
        else:
            assert bool(((vendors.double() - numbers).abs() <= numbers.abs() * UNIT[vendors.dtype] * units).all())
        assert_rows(found, name, numbers.numpy(), times=24 if "hqq" in path.stem else 1)  # its bytes hold rows that are far apart
        if found.encoded[name].encode is not None:
            assert_written(found, name)


def test_all_vendors_are_there() -> None:
    made = set()
    for path in GOLDEN:
        made.add(read_header(path).metadata["made_by"].replace("-7", " 7").replace("-0", " 0").split(" ")[0])
    assert made == {"bitsandbytes", "compressed-tensors", "torchao", "hqq", "gptqmodel", "autoawq"}

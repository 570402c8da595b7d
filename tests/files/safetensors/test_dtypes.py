"""The tables of element types against safetensors' own."""

from __future__ import annotations

import re

import pytest
import safetensors
import safetensors.torch

from lorafold.files.safetensors.info import BITS, NAMES, TORCH_DTYPES


def test_the_names_are_those_that_the_reference_knows() -> None:
    text = b'{"a":{"dtype":"?","shape":[1],"data_offsets":[0,4]}}'
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text + bytes(4))
    known = set(re.findall(r"`([A-Z0-9_]+)`", str(caught.value)))
    assert len(known) > 15
    assert known == BITS.keys()


def test_torch_types_are_those_of_the_reference_and_as_wide() -> None:
    for name, dtype in safetensors.torch._TYPES.items():
        if dtype is not None:
            assert TORCH_DTYPES[name] == dtype
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize * 8 == BITS[name]
        assert NAMES[dtype] == name

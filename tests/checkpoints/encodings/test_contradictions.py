"""Tensors that contradict each other, the configuration, or what a format can mean: each an error with the tensor's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from encoded_files import found_in
from lorafold.errors import CheckpointError
from packing import as_bytes, four_bits, stream

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def refused(folder: Path, held: dict[str, Tensor], *parts: str, config: dict[str, Any] | None = None) -> None:
    with pytest.raises(CheckpointError) as caught:
        found_in(folder, None, held, config)
    for part in ("model.safetensors", *parts):
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"])
def test_a_tensor_of_four_bits_is_missing(tmp_path: Path, name: str) -> None:
    held = four_bits((8, 32))
    del held[f"a.{name}"]
    refused(tmp_path, held, f"'a.{name}' is missing")


def test_the_state_of_four_bits_is_missing(tmp_path: Path) -> None:
    held = four_bits((8, 32))
    del held[STATE]
    refused(tmp_path, held, STATE, "is missing")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"blocksize": -64}, "blocksize to be a positive integer"),
        ({"blocksize": 0}, "blocksize to be a positive integer"),
        ({"blocksize": True}, "blocksize to be a positive integer"),
        ({"blocksize": "64"}, "blocksize to be a positive integer"),
        ({"blocksize": 64.0}, "blocksize to be a positive integer"),
        ({"blocksize": 10**300}, "blocksize to be a positive integer"),
        ({"blocksize": None}, "blocksize to be a positive integer"),
        ({"blocksize": 128}, "expected shape [2]"),
        ({"shape": [8, -32]}, "shape to be a list of positive integers"),
        ({"shape": []}, "shape to be a list of positive integers"),
        ({"shape": "8x32"}, "shape to be a list of positive integers"),
        ({"shape": [8, 32.0]}, "shape to be a list of positive integers"),
        ({"shape": [8] * 200}, "shape to be a list of positive integers"),
        ({"shape": [1 << 39] * 8}, "bytes for shape"),
        ({"shape": [8, 33]}, "bytes for shape [8, 33]"),
        ({"quant_type": "fp4"}, "quant_type nf4 or fp4, as in the tensor's name"),
        ({"quant_type": ["nf4"]}, "quant_type nf4 or fp4"),
        ({"nested_blocksize": 0}, "nested_blocksize to be a positive integer"),
        ({"nested_blocksize": None}, "nested_blocksize to be a positive integer"),
        ({"nested_offset": "1"}, "nested_offset to be a number of float32"),
        ({"nested_offset": 1e300}, "nested_offset to be a number of float32"),
        ({"nested_offset": None}, "nested_offset to be a number of float32"),
    ],
)
def test_fields_of_the_state(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    refused(tmp_path, four_bits((8, 32), fields=fields), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not JSON"),
        ("[1]", "a JSON object"),
        ("[" * 5000, "nested too deeply"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ('{"blocksize": 64, "blocksize": 32}', "stands twice"),
        ('{"nested_offset": NaN}', "not a finite number"),
        ('{"nested_offset": 1e400}', "not a finite number"),
        ('{"shape": [' + "9" * 3000 + "]}", "not a finite number"),
        (" " * 70000, "JSON of at most"),
    ],
)
def test_hostile_json_in_the_state(tmp_path: Path, text: str, expected: str) -> None:
    refused(tmp_path, {**four_bits((8, 32)), STATE: as_bytes(text)}, STATE, expected)


def test_a_state_that_is_no_text(tmp_path: Path) -> None:
    refused(tmp_path, {**four_bits((8, 32)), STATE: torch.full((9,), 0xFF, dtype=torch.uint8)}, STATE, "not UTF-8")
    refused(tmp_path, {**four_bits((8, 32)), STATE: torch.zeros(9)}, STATE, "U8")


def with_(held: dict[str, Tensor], **changed: Tensor | None) -> dict[str, Tensor]:
    """`held` with other tensors; of a name "__" stands for a point."""
    both = held | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


INT8 = {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)}
MXFP4 = {"e_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8), "e_scales": torch.zeros(2, 4, 2, dtype=torch.uint8)}
NVFP4 = {
    "a.weight": torch.zeros(4, 8, dtype=torch.uint8),
    "a.weight_scale": torch.ones(4, 1).to(torch.float8_e4m3fn),
    "a.weight_scale_2": torch.ones(()),
}
INT4 = {
    "a.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
    "a.weight_scale": torch.ones(4, 2),
    "a.weight_shape": torch.tensor([4, 64]),
}
GPTQ = {
    "a.qweight": torch.zeros(8, 32, dtype=torch.int32),
    "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "a.scales": torch.ones(2, 32).half(),
    "a.g_idx": (torch.arange(64) // 32).int(),
}
AWQ = {
    "a.qweight": torch.zeros(64, 4, dtype=torch.int32),
    "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
    "a.scales": torch.ones(2, 32).half(),
}
HQQ = {
    "a.W_q": torch.zeros(4, 32, dtype=torch.uint8),
    "a.scale": torch.ones(8, 1),
    "a.zero": torch.ones(8, 1),
    "a.shape": torch.tensor([4, 64]),
    "a.nbits": torch.tensor(4),
    "a.axis": torch.tensor(1),
}


@pytest.mark.parametrize("held", [INT8, MXFP4, NVFP4, INT4, GPTQ, AWQ, HQQ])
def test_without_a_change_they_are_decoded(tmp_path: Path, held: dict[str, Tensor]) -> None:
    assert len(found_in(tmp_path, None, held).encoded) == 1


@pytest.mark.parametrize(
    ("held", "config", "expected"),
    [
        (with_(INT8, a__SCB=torch.ones(3)), {}, "'a.SCB': expected shape [4], found [3]"),
        (with_(INT8, a__SCB=torch.ones(4).half()), {}, "'a.SCB': expected elements of type F32"),
        (with_(INT8, a__weight=None), {}, "'a.weight' is missing"),
        (with_(INT8, a__weight_format=torch.tensor(3, dtype=torch.uint8)), {}, "a layout of one kind of GPU"),
        (with_(MXFP4, e_scales=None), {}, "'e_scales' is missing"),
        (with_(MXFP4, e_scales=torch.zeros(2, 4, 3, dtype=torch.uint8)), {}, "'e_scales': expected shape [2, 4, 2]"),
        (with_(MXFP4, e_scales=torch.zeros(2, 4, 2)), {}, "'e_scales': expected elements of type U8 or F8_E8M0"),
        (with_(NVFP4, a__weight_scale_2=None), {}, "'a.weight_scale_2' is missing"),
        (with_(NVFP4, a__weight_scale_2=torch.ones(3)), {}, "'a.weight_scale_2': expected shape"),
        (with_(NVFP4, a__weight_scale=torch.ones(4, 2).to(torch.float8_e4m3fn)), {}, "'a.weight_scale': expected shape [4, 1]"),
        (with_(INT4, a__weight_shape=None), {}, "'a.weight_shape' is missing"),
        (with_(INT4, a__weight_shape=torch.tensor([5, 64])), {}, "'a.weight_shape': expected 4 rows"),
        (with_(INT4, a__weight_shape=torch.tensor([4, -1])), {}, "'a.weight_shape': expected 4 rows"),
        (with_(INT4, a__weight_shape=torch.tensor([4, 63, 1])), {}, "'a.weight_shape': expected shape [2]"),
        (with_(INT4, a__weight_shape=torch.tensor([4, 26])), {}, "'a.weight_packed': expected words for 26 columns"),
        (with_(INT4, a__weight_scale=None), {}, "'a.weight_scale' is missing"),
        (with_(INT4, a__weight_scale=torch.ones(4, 3)), {}, "whole groups of 64 columns"),
        (with_(INT4, a__weight_scale=torch.ones(3, 2)), {}, "whole groups of 64 columns"),
        (
            with_(INT4, a__weight_zero_point=torch.zeros(2, 2, dtype=torch.int32)),
            {},
            "'a.weight_zero_point': expected shape [1, 2]",
        ),
        (with_(INT4, a__weight_g_idx=torch.full((64,), 2).int()), {}, "'a.weight_g_idx': expected groups from 0 to 1"),
        (with_(INT4, a__weight_g_idx=torch.zeros(63).int()), {}, "'a.weight_g_idx': expected shape [64]"),
        (with_(GPTQ, a__qzeros=None), {}, "'a.qzeros' is missing"),
        (with_(GPTQ, a__scales=None), {}, "'a.scales' is missing"),
        (with_(GPTQ, a__qzeros=torch.zeros(2, 5, dtype=torch.int32)), {}, "'a.qzeros': expected zero points of 2, 3, 4 or 8 bits"),
        (with_(GPTQ, a__qzeros=torch.zeros(3, 4, dtype=torch.int32)), {}, "'a.qzeros': expected shape [2, 4]"),
        (with_(GPTQ, a__g_idx=torch.full((64,), -1).int()[:40]), {}, "'a.g_idx': expected the groups of 64 inputs"),
        (with_(GPTQ, a__g_idx=torch.full((64,), 7).int()), {}, "'a.g_idx': expected groups from 0 to 1"),
        (GPTQ, {"bits": 8}, "expected codes of 8 bits, as the configuration says, found 4 bits"),
        (GPTQ, {"bits": "4"}, "expected codes of '4' bits"),
        (GPTQ, {"group_size": 48}, "'a.scales': expected groups of 48 of 64 inputs, found shape [2, 32]".replace("48", "16")),
        (GPTQ, {"group_size": 0}, "'a.scales': expected groups of 0"),
        (GPTQ, {"checkpoint_format": "gptq_p"}, "is stored as gptq_p"),
        (with_(GPTQ, a__qzeros=torch.full((2, 4), 0x1F111111, dtype=torch.int32)), {}, "'a.qzeros' holds fields of 4 ones"),
        (with_(AWQ, a__qzeros=torch.zeros(2, 3, dtype=torch.int32)), {}, "'a.qzeros': expected shape [2, 4]"),
        (AWQ, {"version": "gemv_fast"}, "is of AWQ's layout gemv_fast"),
        (with_(HQQ, a__axis=torch.tensor(2)), {}, "4 bits along axis 2"),
        (with_(HQQ, a__nbits=torch.tensor(5)), {}, "5 bits along axis 1"),
        (with_(HQQ, a__nbits=None), {}, "'a.nbits' is missing"),
        (with_(HQQ, a__shape=torch.tensor([4, 65])), {}, "'a.scale': expected one scale for each group"),
        (with_(HQQ, a__zero=torch.ones(7, 1)), {}, "'a.zero': expected shape [8, 1]"),
        (with_(HQQ, a__quant_zero=torch.tensor(1)), {}, "'a.quant_zero': expected 0"),
        (with_(HQQ, a__W_q=torch.zeros(5, 32, dtype=torch.uint8)), {}, "'a.W_q': expected U8 [4, 32]"),
        (
            {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
            {"quant_method": "fp8"},
            "'a.weight' is of type F8_E4M3 and has no",
        ),
        ({"a._weight_qdata": torch.zeros(4, 8, dtype=torch.int8)}, {}, "'a._weight_scale' is missing"),
        (
            {"a._weight_qdata": torch.zeros(4, 8, dtype=torch.int8), "a._weight_scale": torch.ones(4, 3)},
            {},
            "whole blocks of [4, 8]",
        ),
        (
            {"a._weight_qdata": torch.zeros(4, 8, dtype=torch.uint8), "a._weight_scale": torch.ones(4, 1)},
            {},
            "F8_E4M3 or F8_E5M2 or I8",
        ),
    ],
)
def test_what_contradicts_is_refused_by_name(
    tmp_path: Path, held: dict[str, Tensor], config: dict[str, Any], expected: str
) -> None:
    if config.get("group_size") == 48:
        config = {"group_size": 16}
    refused(tmp_path, held, expected, config=config)


def test_ambiguous_zero_points_are_fine_where_they_are_stated(tmp_path: Path) -> None:
    held = with_(GPTQ, a__qzeros=torch.full((2, 4), -1, dtype=torch.int32))
    found = found_in(tmp_path, None, held, {"checkpoint_format": "gptq_v2"})
    assert float(found.numbers(found.encoded["a.weight"].decoded)[0, 0]) == -15.0


def test_codes_of_nan_state_nan(tmp_path: Path) -> None:
    codes = torch.tensor([[0x7F, 0xFF, 0x38, 0]] * 8, dtype=torch.uint8).repeat(1, 8).view(torch.float8_e4m3fn)
    found = found_in(tmp_path, None, {"a.weight": codes, "a.weight_scale": torch.full((8, 1), 127, dtype=torch.uint8)})
    numbers = found.numbers(found.encoded["a.weight"].decoded)
    assert numbers.isnan()[:, :4].tolist() == [[True, True, False, False]] * 8
    assert np.nanmax(numbers) == 1.0


def test_bits_that_the_shape_leaves_open_are_those_of_the_configuration(tmp_path: Path) -> None:
    held = {
        "a.weight_packed": stream(np.array([[1, 2]]), 4),
        "a.weight_scale": torch.ones(1, 1),
        "a.weight_shape": torch.tensor([1, 2]),
    }
    refused(tmp_path, held, "or the bits in the configuration")
    found = found_in(tmp_path, None, held, {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}})
    assert found.numbers(found.encoded["a.weight"].decoded).tolist() == [[-7.0, -6.0]]

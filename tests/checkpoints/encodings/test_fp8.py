"""FP8: which weights are found, which blocks their scales are for, what contradicts, and how sums become codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorafold
from lorafold.checkpoints.checkpoint import BaseReader, Checkpoint
from lorafold.checkpoints.encodings.again import encoded_again
from lorafold.checkpoints.encodings.fp8 import encode_fp8, stated_block
from lorafold.errors import CheckpointError
from lorafold.files.evaluation import rows_of
from quantised import E4M3, codes_of, quantised, spread, stated, uniform

CODES = torch.arange(256, dtype=torch.uint8)


def opened(folder: Path, config: dict[str, Any] | None = None, **held: Tensor) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file({name.replace("__", "."): tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    return lorafold.open_checkpoint(folder)


def numbers(checkpoint: Checkpoint, name: str) -> np.ndarray:
    matrix = checkpoint.tensors[name]
    with BaseReader(checkpoint) as reader:
        return reader.rows(matrix, 0, matrix.shape[0]).reshape(matrix.shape).numpy()


def block_config(*block: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": list(block)}


def compressed(strategy: str, block: list[int] | None = None) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "block_structure": block}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"weights": weights}}}


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale", "scale_inv", "qscale_weight"])
def test_all_codes_state_their_numbers(tmp_path: Path, name: str) -> None:
    codes, scale = CODES.view(16, 16).view(torch.float8_e4m3fn), torch.tensor(0.0123)
    found = opened(tmp_path, **{"a__weight": codes, f"a__{name}": scale})
    assert found.tensors.keys() == {"a.weight"}
    assert found.encoded["a.weight"].encoding == "FP8 with one scale"
    expected = E4M3.reshape(16, 16) * float(scale)
    assert np.array_equal(numbers(found, "a.weight"), expected, equal_nan=True)
    assert np.array_equal(np.signbit(numbers(found, "a.weight"))[:8], np.signbit(expected)[:8])


@pytest.mark.parametrize(("rows", "columns"), [(576, 192), (192, 130), (128, 128), (1, 1), (257, 5)])
@pytest.mark.parametrize("config", [None, block_config(128, 128), compressed("block", [128, 128])])
def test_blocks_are_cut_short_at_the_ends(tmp_path: Path, rows: int, columns: int, config: dict[str, Any] | None) -> None:
    """576 rows are four blocks and a half; 192 rows with two scales are 128 and 64, not 96 and 96."""
    codes, scales = quantised(torch.randn(rows, columns), (128, 128))
    found = opened(tmp_path, config, a__weight=codes, a__weight_scale_inv=scales)
    assert np.array_equal(numbers(found, "a.weight"), stated(codes, scales, (128, 128)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,), (1, 5), (1, 1)])
def test_scales_of_tensors_rows_and_columns(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, scales = torch.randn(6, 5).to(torch.float8_e4m3fn), (torch.rand(shape) + 0.5).to(dtype)
    found = opened(tmp_path, compressed("channel"), a__weight=codes, a__weight_scale=scales)
    wide = scales.double().numpy()
    expected = codes.double().numpy() * (wide[:, None] if shape == (6,) else wide)
    assert np.array_equal(numbers(found, "a.weight"), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    codes, exponents = torch.randn(3, 4).to(torch.float8_e4m3fn), torch.tensor([[120], [127]], dtype=torch.uint8)
    config = {**block_config(2, 4), "scale_fmt": "ue8m0"}
    found = opened(tmp_path, config, a__weight=codes, a__weight_scale_inv=exponents.view(dtype))
    expected = codes.double().numpy() * np.array([2.0**-7, 2.0**-7, 1.0])[:, None]
    assert np.array_equal(numbers(found, "a.weight"), expected)


def test_stacks_of_experts(tmp_path: Path) -> None:
    codes, scales = quantised(torch.randn(3, 20, 9), (8, 8))
    found = opened(tmp_path, block_config(8, 8), experts__gate_up_proj=codes, experts__gate_up_proj_scale_inv=scales)
    assert found.tensors.keys() == {"experts.gate_up_proj"}
    assert np.array_equal(numbers(found, "experts.gate_up_proj"), stated(codes, scales, (8, 8)))


def test_scales_vanish_and_the_rest_stays_in_its_order(tmp_path: Path) -> None:
    codes, scales = quantised(torch.randn(4, 4), (128, 128))
    plain = {"a__bias": torch.ones(4), "b__weight": torch.ones(2, 2), "logit_scale": torch.ones(1), "c__scale": torch.ones(2)}
    aside = {"a__input_scale": torch.ones(1), "attn__k_scale": torch.ones(1)}
    found = opened(tmp_path, a__weight=codes, a__weight_scale_inv=scales, **plain, **aside)
    assert found.tensors.keys() == {"a.weight", *(name.replace("__", ".") for name in plain)}
    assert set(found.companions) == {name.replace("__", ".") for name in aside}
    assert found.as_stored.keys() == found.stored.keys()
    assert found.nbytes == sum(each.nbytes for each in found.stored.values())
    nothing = opened(tmp_path / "float", **plain, **aside)
    assert nothing.tensors == nothing.stored  # no name alone makes a tensor vanish


@pytest.mark.parametrize(
    ("config", "scales", "expected"),
    [
        (None, torch.ones(2, 2), r"expected one scale, \[192, 1\], or \[2, 1\] for blocks of 128 × 128, found \[2, 2\]"),
        (block_config(64, 64), torch.ones(2, 1), r"expected \[3, 2\] for the blocks of 64 × 64.*found \[2, 1\]"),
        (block_config(128, 128), torch.ones(192, 1), r"expected \[2, 1\] for the blocks of 128 × 128.*found \[192, 1\]"),
        (None, torch.ones(2, 1, dtype=torch.int32), "holds|scale"),
        (block_config(0, 128), torch.ones(2, 1), r"blocks of \[0, 128\], expected two positive integers"),
        ({"weight_block_size": "tall"}, torch.ones(2, 1), "expected two positive integers"),
    ],
)
def test_what_contradicts_is_refused_by_name(tmp_path: Path, config: Any, scales: Tensor, expected: str) -> None:
    codes = torch.randn(192, 100).to(torch.float8_e4m3fn)
    if scales.dtype == torch.int32:
        assert not opened(tmp_path, config, a__weight=codes, a__weight_scale=scales).encoded
        with pytest.raises(CheckpointError, match=r"'a.weight_scale_inv'.*found I32"):
            opened(tmp_path, config, a__weight=codes, a__weight_scale_inv=scales)
        return
    with pytest.raises(CheckpointError, match=expected) as caught:
        opened(tmp_path, config, a__weight=codes, a__weight_scale_inv=scales)
    if "integers" not in expected:
        assert "model.safetensors" in caught.value.message
        assert "'a.weight'" in caught.value.message
        assert caught.value.hint


def test_what_states_a_block() -> None:
    assert stated_block({}) is None
    assert stated_block({"weight_block_size": None}) is None
    assert stated_block({"weight_block_size": "128x64"}) == (128, 64)
    assert stated_block({"config_groups": {"g": {"weights": {"strategy": "channel", "block_structure": [1, 2]}}}}) is None
    assert stated_block({"config_groups": 3}) is None


def again(tmp_path: Path, codes: Tensor, scales: Tensor, sums: np.ndarray, noise: np.ndarray | None) -> tuple[Tensor, Tensor]:
    checkpoint = opened(tmp_path, block_config(8, 8), a__weight=codes, a__weight_scale_inv=scales)
    encoded = checkpoint.encoded["a.weight"]
    rows = rows_of(encoded.natural, 0, codes.numel() // codes.shape[-1], codes.shape[-1])
    random = None if noise is None else torch.from_numpy(noise).float()
    with BaseReader(checkpoint) as reader:
        return encoded_again(encoded, rows, torch.from_numpy(sums), reader.read, random)


@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_those_of_numpy(tmp_path: Path, stochastic: bool) -> None:
    torch.manual_seed(5)
    codes, scales = quantised(torch.randn(20, 13), (8, 8), peak=448)
    old, full = codes.view(torch.uint8).numpy(), spread(scales.double().numpy(), (20, 13), (8, 8))
    sums = stated(codes, scales, (8, 8)) * (1 + 0.1 * np.random.default_rng(0).standard_normal((20, 13)))
    noise = uniform(0, "a.weight", 260) if stochastic else None
    made, numbers_made = again(tmp_path, codes, scales, sums, noise)
    expected = codes_of(sums, full, old, noise)
    assert np.array_equal(made.numpy().reshape(20, 13), expected)
    assert np.array_equal(numbers_made.numpy(), E4M3[expected] * full)


@pytest.mark.parametrize("stochastic", [False, True])
def test_what_does_not_change_keeps_its_bytes(tmp_path: Path, stochastic: bool) -> None:
    """Every code, both zeros and both NaN among them; a block whose scale is zero too."""
    codes = CODES.view(32, 8).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.1], [3.0], [0.0], [2.0**-140]])
    checkpoint = opened(tmp_path, block_config(8, 8), a__weight=codes, a__weight_scale_inv=scales)
    noise = uniform(0, "a.weight", 256) if stochastic else None
    made, _ = again(tmp_path, codes, scales, numbers(checkpoint, "a.weight"), noise)
    assert torch.equal(made, CODES)


def test_beyond_the_largest_is_the_largest(tmp_path: Path) -> None:
    codes, scales = torch.zeros(1, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
    sums = np.array([[500.0, -1e30, 449.0, -448.0]])
    for noise in (None, np.full(4, 0.01)):
        made, _ = again(tmp_path, codes, scales, sums, noise)
        assert E4M3[made.numpy()].tolist() == [448, -448, 448, -448]


def test_noise_is_unbiased(tmp_path: Path) -> None:
    """The mean of n draws is within 5 standard errors of the number: one draw's deviation is at most half a step, of 1."""
    n = 4096
    codes, scales = torch.full((1, n), 8.0).to(torch.float8_e4m3fn), torch.ones(1, 1)
    checkpoint = opened(tmp_path, {"weight_block_size": [1, n]}, a__weight=codes, a__weight_scale_inv=scales)
    encoded = checkpoint.encoded["a.weight"]
    with BaseReader(checkpoint) as reader:
        random = torch.from_numpy(uniform(3, "x", n)).float()[None]
        made = encode_fp8(torch.full((1, n), 8.3, dtype=torch.float64), encoded.natural, reader.read, random)
    assert set(made.double().unique().tolist()) == {8.0, 9.0}
    assert abs(float(made.double().mean()) - 8.3) < 5 * 0.5 / n**0.5

"""Decoded numbers against numpy and fractions, rows against the whole, and codes that are written again."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from encoded_files import assert_rows, assert_written, codes_again, found_in, raw
from lorafold.checkpoints.encodings.gguf_blocks import LAYOUTS, gguf_encoded
from oracle import round_fraction
from packing import E2M1, as_bytes, awq_words, four_bits, nibbles, numbers_of_four_bits, stream


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(6, 96), (5, 7), (33, 65), (3, 5, 7), (1, 1)])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 32])
def test_bitsandbytes_in_four_bits(tmp_path: Path, shape: tuple[int, ...], nested: bool, blocksize: int) -> None:
    """Blocks straddle rows, and at an odd number of columns bytes do."""
    held = four_bits(shape, nested=nested, blocksize=blocksize)
    found = found_in(tmp_path, None, held)
    assert found.encoded["a.weight"].together == 1 + np.prod(shape[1:]) % 2
    assert_rows(found, "a.weight", numbers_of_four_bits(held, shape, blocksize), times=2)
    if shape != (1, 1):
        assert_written(found, "a.weight")


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_bitsandbytes_in_storage_of_floats(tmp_path: Path, storage: torch.dtype) -> None:
    held = four_bits((8, 32))
    stored = {**held, "a.weight": held["a.weight"].view(-1).view(storage).view(-1, 1)}
    found = found_in(tmp_path, None, stored)
    assert_rows(found, "a.weight", numbers_of_four_bits(held, (8, 32)))
    numbers = found.numbers(found.encoded["a.weight"].decoded)
    assert codes_again(found, "a.weight", numbers, None) == raw(held["a.weight"])


def test_bitsandbytes_int8_is_the_quotient_rounded_once(tmp_path: Path) -> None:
    held = {"a.weight": torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(8, 32), "a.SCB": torch.rand(8) + 0.5}
    found = found_in(tmp_path, None, held)
    exact = [
        [round_fraction(Fraction(int(q)) * Fraction(float(scb)) / 127, torch.float64) for q in row]
        for row, scb in zip(held["a.weight"], held["a.SCB"], strict=True)
    ]
    assert_rows(found, "a.weight", np.array(exact))
    assert_written(found, "a.weight")


def test_experts_of_gpt_oss_are_transposed(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = found_in(tmp_path, None, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    vendors = convert_moe_packed_tensors(blocks, scales)
    values = E2M1[nibbles(blocks, high_first=False)] * 2.0 ** (scales.numpy().astype(float) - 127)[..., None]
    assert_rows(found, name, values.reshape(3, 8, 64).swapaxes(1, 2))
    assert torch.equal(found.numbers(found.encoded[name].decoded).bfloat16(), vendors)
    assert_written(found, name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_all_exponents_of_microscaling(tmp_path: Path, dtype: torch.dtype) -> None:
    """255 is NaN, and 0 a power of two below float32's normal numbers."""
    scales = torch.arange(256, dtype=torch.int16).to(torch.uint8).reshape(64, 4)
    codes = torch.randint(0, 126, (64, 128), dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = found_in(tmp_path, None, {"a.weight": codes, "a.weight_scale": scales.view(dtype)}, {"quant_method": "mxfp8"})
    assert found.encoded["a.weight"].encoding == "MXFP8"
    powers = np.where(scales.numpy() == 255, np.nan, 2.0 ** (scales.numpy().astype(float) - 127))
    assert_rows(found, "a.weight", codes.double().numpy() * np.repeat(powers, 32, 1))
    assert_written(found, "a.weight")


@pytest.mark.parametrize("stack", [(), (3,)])
def test_nvfp4_of_modelopt(tmp_path: Path, stack: tuple[int, ...]) -> None:
    codes = torch.randint(0, 256, (*stack, 6, 24), dtype=torch.uint8)
    scales = (torch.rand(*stack, 6, 3) * 400 + 1).to(torch.float8_e4m3fn)
    total = torch.rand(stack)
    held = {"a.weight": codes, "a.weight_scale": scales, "a.weight_scale_2": total, "a.input_scale": torch.ones(())}
    found = found_in(tmp_path, None, held, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    values = E2M1[nibbles(codes, high_first=False)] * np.repeat(scales.double().numpy(), 16, -1)
    assert_rows(found, "a.weight", values * total.double().numpy()[..., None, None] if stack else values * float(total))
    assert_written(found, "a.weight")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_integers_of_compressed_tensors(tmp_path: Path, bits: int, zeros: bool, act_order: bool) -> None:
    rows, columns, group = 13, 96, 32
    q, z = RNG.integers(0, 1 << bits, (rows, columns)), RNG.integers(0, 1 << bits, (rows, 3))
    scales, index = (torch.rand(rows, 3) + 0.1).bfloat16(), RNG.integers(0, 3, columns)
    held = {"a.weight_packed": stream(q, bits), "a.weight_scale": scales, "a.weight_shape": torch.tensor([rows, columns])}
    if zeros:
        held["a.weight_zero_point"] = stream(z.T, bits).T.contiguous()
    if act_order:
        held["a.weight_g_idx"] = torch.from_numpy(index).int()
    groups = index if act_order else np.arange(columns) // group
    found = found_in(tmp_path, None, held)
    less = z[:, groups] if zeros else 1 << (bits - 1)
    assert_rows(found, "a.weight", (q - less) * scales.double().numpy()[:, groups])
    assert_written(found, "a.weight")


@pytest.mark.parametrize("scale", [(), (1,), (6, 1), (6, 2)])
def test_integers_in_bytes(tmp_path: Path, scale: tuple[int, ...]) -> None:
    codes, scales = torch.randint(-128, 128, (6, 10), dtype=torch.int8), torch.rand(scale) + 0.1
    found = found_in(tmp_path, None, {"a.weight": codes, "a.weight_scale": scales})
    wide = scales.double().numpy()
    expected = codes.double().numpy() * (np.repeat(wide, 5, 1) if scale == (6, 2) else wide)
    assert_rows(found, "a.weight", expected)
    assert_written(found, "a.weight")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(tmp_path: Path, bits: int, layout: str | None, act_order: bool) -> None:
    inputs, outputs = 64, 96
    q, z = RNG.integers(0, 1 << bits, (inputs, outputs)), RNG.integers(0, (1 << bits) - 1, (2, outputs))
    scales = (torch.rand(2, outputs) + 0.1).half()
    index = RNG.integers(0, 2, inputs) if act_order else np.arange(inputs) // 32
    held = {
        "a.qweight": stream(q.T, bits).T.contiguous(),
        "a.qzeros": stream(z, bits),
        "a.scales": scales,
        "a.g_idx": torch.from_numpy(index).int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32} | ({"checkpoint_format": layout} if layout else {})
    found = found_in(tmp_path, None, held, config)
    less = (z if layout == "gptq_v2" else z + 1)[index]
    assert_rows(found, "a.weight", ((q - less) * scales.double().numpy()[index]).T)
    assert_written(found, "a.weight")


def test_awq(tmp_path: Path) -> None:
    q, z, scales = RNG.integers(0, 16, (64, 24)), RNG.integers(0, 16, (2, 24)), (torch.rand(2, 24) + 0.1).half()
    held = {"a.qweight": awq_words(q), "a.qzeros": awq_words(z), "a.scales": scales}
    found = found_in(tmp_path, None, held, {"quant_method": "awq", "version": "gemm", "group_size": 32})
    groups = np.arange(64) // 32
    assert_rows(found, "a.weight", ((q - z[groups]) * scales.double().numpy()[groups]).T)
    assert_written(found, "a.weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_of_comfyui_with_a_scale_or_none(tmp_path: Path, dtype: torch.dtype) -> None:
    """All codes; NaN and infinity are what they say."""
    codes, scale = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(16, 16).view(dtype), torch.tensor(0.0123)
    mark = torch.zeros(2).to(dtype)
    held = {
        "a.weight": codes,
        "a.scale_weight": scale,
        "a.scale_input": torch.ones(()),
        "b.weight": codes[:3].clone(),
        "scaled_fp8": mark,
    }
    found = found_in(tmp_path, None, held)
    assert found.encoded.keys() == {"a.weight", "b.weight"}
    for name, factor in (("a.weight", float(scale)), ("b.weight", 1.0)):
        assert_rows(found, name, found.held[name].double().numpy() * factor)
        numbers = found.numbers(found.encoded[name].natural)
        assert codes_again(found, name, numbers, None) == raw(found.held[name])


def test_experts_of_fbgemm_have_a_scale_for_each_output(tmp_path: Path) -> None:
    codes, scales = torch.randn(2, 6, 10).to(torch.float8_e4m3fn), torch.rand(2, 1, 10)
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    held = {name: codes, f"{name}_scale": scales}
    found = found_in(tmp_path, None, held, {"quant_method": "fbgemm_fp8"})
    assert_rows(found, name, codes.double().numpy() * scales.double().numpy())
    assert_written(found, name)


FLOAT16 = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where in a block numbers in float16 lie; of the others at its beginning."""


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_of_gguf(tmp_path: Path, kind: str) -> None:
    """gguf-py computes in float32: equal after one rounding."""
    size = LAYOUTS[kind].size
    blocks = RNG.integers(0, 256, (5, 3, size), dtype=np.uint8)
    for at in () if kind == "MXFP4" else FLOAT16.get(kind, (0,)):
        blocks[..., at : at + 2] = RNG.normal(0, 1, (5, 3, 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = RNG.integers(110, 140, (5, 3))
    words = blocks.reshape(5, 3 * size)
    found = found_in(
        tmp_path, lambda stored, config, read: iter([("a", gguf_encoded(stored["a"], kind))]), {"a": torch.from_numpy(words)}
    )
    numbers = found.numbers(found.encoded["a"].decoded)
    vendors = gguf.dequantize(words, getattr(gguf.GGMLQuantizationType, kind))
    assert np.array_equal(numbers.float().numpy(), vendors)
    assert found.encoded["a"].bits == size * 8 / LAYOUTS[kind].numel
    assert_rows(found, "a", numbers.numpy())
    assert_written(found, "a")


@pytest.mark.parametrize("kind", ["nf4", "int4", "mxfp4"])
def test_noise_is_unbiased(tmp_path: Path, kind: str) -> None:
    """The mean of n draws is within 5 standard errors of the number; one draw's deviation is at most half a step."""
    n = 4096
    if kind == "nf4":
        held = four_bits((1, n), nested=False)
        held["a.weight.absmax"].fill_(1.0)
        value, step = 0.31, 2 / 15
    elif kind == "int4":
        held = {
            "a.weight_packed": torch.zeros(1, n // 8, dtype=torch.int32),
            "a.weight_scale": torch.ones(1, 1),
            "a.weight_shape": torch.tensor([1, n]),
        }
        value, step = -2.3, 1.0
    else:
        held = {
            "a.weight_packed": torch.zeros(1, n // 2, dtype=torch.uint8),
            "a.weight_scale": torch.full((1, n // 32), 127).byte(),
        }
        value, step = -3.4, 1.0
    found = found_in(tmp_path, None, held)
    from encoded_files import with_codes

    uniform = (torch.randint(0, 1 << 23, (1, n)) * 2 + 1).double() * 2.0**-24
    made = with_codes(found, "a.weight", codes_again(found, "a.weight", torch.full((1, n), value).double(), uniform))
    assert len(made.unique()) == 2
    assert abs(float(made.mean()) - value) < 5 * step / 2 / n**0.5


def test_out_of_range_gets_the_end_and_a_zero_scale_keeps_its_codes(tmp_path: Path) -> None:
    held = {
        "a.weight_packed": torch.full((2, 1), 0x12345678, dtype=torch.int32),
        "a.weight_scale": torch.tensor([[1.0], [0.0]]),
        "a.weight_shape": torch.tensor([2, 8]),
    }
    found = found_in(tmp_path, None, held, {"config_groups": {"g": {"weights": {"num_bits": 4}}}})
    sums = torch.tensor([[99.0, -99, 7.4, -8.4, 0, 0, 0, 0], [5.0, 1, 1, 1, 1, 1, 1, 1]]).double()
    made = torch.frombuffer(bytearray(codes_again(found, "a.weight", sums, torch.full_like(sums, 0.01))), dtype=torch.int32)
    assert [hex(int(word) & 0xFFFFFFFF) for word in made] == ["0x88880f0f", "0x12345678"]


def test_text_of_a_state_may_be_json_of_any_spacing(tmp_path: Path) -> None:
    held = four_bits((4, 32), nested=False)
    state = '{ "quant_type":"nf4",\n "blocksize": 64, "dtype": "float16", "shape": [4, 32] }'
    found = found_in(tmp_path, None, {**held, "a.weight.quant_state.bitsandbytes__nf4": as_bytes(state)})
    assert_rows(found, "a.weight", numbers_of_four_bits(held, (4, 32)))


@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
@pytest.mark.parametrize("shape", [(32, 32), (32, 64)])
def test_conv1d_is_stored_as_a_linear_layer(tmp_path: Path, kind: str, shape: tuple[int, int]) -> None:
    """GPT-2's model has (in, out) where what is quantised has (out, in); by name and family, as square weights do not tell."""
    if kind == "nf4":
        held = four_bits(shape)
        linear = numbers_of_four_bits(held, shape)
    elif kind == "int8":
        held = {"a.weight": torch.randint(-127, 128, shape, dtype=torch.int8), "a.SCB": torch.rand(shape[0]) + 0.5}
        linear = held["a.weight"].double().numpy() * held["a.SCB"].double().numpy()[:, None] / 127
    else:
        q = RNG.integers(0, 16, shape[::-1])
        zeros, scales = torch.zeros(1, shape[0] // 8, dtype=torch.int32), torch.rand(1, shape[0]).half()
        held = {"a.qweight": stream(q.T, 4).T.contiguous(), "a.qzeros": zeros, "a.scales": scales}
        linear = ((q - 1) * scales.double().numpy()).T
    named = {f"h.0.attn.c_proj{name[1:]}": tensor for name, tensor in held.items()}
    name = "h.0.attn.c_proj.weight"
    for model, expected in (({"model_type": "gpt2"}, linear.T), ({"model_type": "gpt_bigcode"}, linear), (None, linear)):
        found = found_in(tmp_path, None, named, {"bits": 4} if kind == "gptq" else {}, model)
        assert np.array_equal(found.numbers(found.encoded[name].decoded).numpy(), expected)
        assert_written(found, name)

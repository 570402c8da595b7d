"""Make the golden files of the encodings: tiny weights quantised by the vendors' own code, and the floats that it makes of them.

    python scripts/make_golden_encodings.py --gptqmodel SOURCES --autoawq SOURCES

The vendors are bitsandbytes, compressed-tensors, torchao, hqq, and of gptqmodel and AutoAWQ, which import
only beside a GPU, the functions that dequantise, taken out of their sources (their PyPI archives, unpacked). A vendor that is not
there is left out. Each file has ``stored.…``, what a checkpoint would hold, ``expected.…``, what the vendor reads there, and in its
metadata who made it, and the configuration.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "tests" / "checkpoints" / "encodings" / "golden"

Made = tuple[str, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""Name of the file, what is stored, what is expected, the configuration."""


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype)


def bitsandbytes() -> Iterator[Made]:
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16):
                W = weight(24, 96)
                codes, state = functional.quantize_4bit(
                    W.reshape(1, -1), quant_type=kind, compress_statistics=nested, quant_storage=storage
                )
                expected = functional.dequantize_4bit(codes, state).reshape(W.shape)  # one row: its CPU code needs that
                state.shape = W.shape
                stored = {"a.weight": codes} | {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
                name = f"bitsandbytes-{kind}{'-nested' if nested else ''}-{str(storage).removeprefix('torch.')}"
                yield name, stored, {"a.weight": expected}, {"quant_method": "bitsandbytes", "load_in_4bit": True}
    codes, scb, _ = functional.int8_vectorwise_quant(weight(12, 40, torch.float16))
    expected = functional.int8_vectorwise_dequant(codes, scb)
    stored = {"a.weight": codes, "a.SCB": scb, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    yield "bitsandbytes-int8", stored, {"a.weight": expected}, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def vendors_own(name: str) -> Callable[..., Any]:
    """bitsandbytes' own code in torch for an operation, which does what its code for GPUs does; that for CPUs picks other codes of
    eight bits here and there."""
    import bitsandbytes
    from bitsandbytes.backends.utils import _get_4bit_code

    def bounds(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
        code = _get_4bit_code(kind, device)
        order = torch.argsort(code)
        return (code[order[:-1]] + code[order[1:]]) / 2, order

    source = Path(bitsandbytes.__file__).parent / "backends" / "default" / "ops.py"
    for node in ast.parse(source.read_text()).body:
        mark = node.decorator_list[0] if isinstance(node, ast.FunctionDef) and node.decorator_list else None
        if isinstance(mark, ast.Call) and mark.args and getattr(mark.args[0], "value", None) == f"bitsandbytes::{name}":
            node.decorator_list, node.name = [], "own"
            space: dict[str, Any] = {"torch": torch, "Optional": Optional, "_get_4bit_quantize_bounds": bounds}
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), str(source), "exec"), space)
            return space["own"]
    raise LookupError(name)


def loaded_by_bitsandbytes() -> None:
    """Weights of floats, and what a layer computes with that bitsandbytes made of them when a model was loaded."""
    from bitsandbytes import functional

    in_four, in_eight, rows = (vendors_own(name) for name in ("quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant"))
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    cases = [(kind, "BF16", (24, 96)) for kind in ("nf4", "nf4-single", "fp4", "int8")]
    cases += [("nf4", "F16", (24, 96)), ("nf4", "F32", (13, 7)), ("fp4", "F16", (13, 7)), ("nf4", "BF16", (190, 96))]
    for kind, loaded, shape in cases:
        W = weight(*shape, dtypes[loaded])
        if kind == "int8":
            codes, scb, _ = rows(W.half())
            expected = functional.int8_vectorwise_dequant(codes, scb)
        else:
            codes, absmax = in_four(W, 64, kind[:3], torch.uint8)
            if kind == "nf4":
                table, mean = functional.create_dynamic_map(), absmax.mean()
                each, largest = in_eight(absmax - mean, table, 256)
                absmax = table[each.long()] * largest.repeat_interleave(256)[: each.numel()] + mean
            fields = torch.stack([codes >> 4, codes & 15], -1).view(-1)[: W.numel()].long()
            products = functional.get_4bit_type(kind[:3], "cpu")[fields] * absmax.repeat_interleave(64)[: W.numel()]
            expected = products.view(shape).to(W.dtype)
        path = FOLDER / "loaded" / f"{kind}-{loaded}-{shape[0]}x{shape[1]}.safetensors"
        path.parent.mkdir(exist_ok=True)
        made_by = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
        save_file({"weight": W, "expected": expected}, path, {"made_by": made_by, "kind": kind, "loaded": loaded})


def compressed_tensors() -> Iterator[Made]:
    from compressed_tensors.compressors import (
        IntQuantizationCompressor,
        MXFP4PackedCompressor,
        MXFP6PackedCompressor,
        MXFP8QuantizationCompressor,
        NVFP4PackedCompressor,
        PackedQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def made(name: str, compressor: Any, state: dict[str, Tensor], **arguments: Any) -> Made:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        stored = compressor.compress(state, scheme)
        expected = compressor.decompress(stored, scheme)["weight"]
        config = {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": json.loads(scheme.weights.model_dump_json())}},
        }
        return name, {f"a.{each}": tensor for each, tensor in stored.items()}, {"a.weight": expected.detach()}, config

    for bits in range(2, 9):
        for symmetric in (True, False):
            W = weight(13, 96)
            groups = W.reshape(13, 3, 32)
            low, high = groups.amin(-1), groups.amax(-1)
            if symmetric:
                scale, zero = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5), torch.zeros(13, 3, dtype=torch.int8)
            else:
                scale = (high - low) / (2**bits - 1)
                zero = (-(2 ** (bits - 1)) - low / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
            state = {"weight": W, "weight_scale": scale, "weight_zero_point": zero}
            name = f"compressed-int{bits}-{'symmetric' if symmetric else 'zeros'}"
            yield made(
                name, PackedQuantizationCompressor, state, num_bits=bits, symmetric=symmetric, strategy="group", group_size=32
            )
    W = weight(13, 40)
    state = {
        "weight": W,
        "weight_scale": W.abs().amax(1, keepdim=True) / 127,
        "weight_zero_point": torch.zeros(13, 1, dtype=torch.int8),
    }
    yield made("compressed-int8-rows", IntQuantizationCompressor, state, num_bits=8, symmetric=True, strategy="channel")
    W = weight(12, 96)
    peak = W.abs().reshape(12, -1, 16).amax(-1)
    total = 2688 / W.abs().max().reshape(1)
    state = {"weight": W, "weight_scale": (peak / 6 * total).to(torch.float8_e4m3fn).float(), "weight_global_scale": total}
    yield made("compressed-nvfp4", NVFP4PackedCompressor, state, num_bits=4, type="float", strategy="tensor_group", group_size=16)
    powers = torch.exp2(torch.floor(torch.log2(W.abs().reshape(12, -1, 32).amax(-1))) - 2)
    state = {"weight": W, "weight_scale": powers}
    yield made("compressed-mxfp4", MXFP4PackedCompressor, state, num_bits=4, type="float", strategy="group", group_size=32)
    state = {"weight": W, "weight_scale": powers}
    yield made("compressed-mxfp6", MXFP6PackedCompressor, state, num_bits=6, type="float", strategy="group", group_size=32)
    state = {"weight": W, "weight_scale": powers / 64}
    yield made("compressed-mxfp8", MXFP8QuantizationCompressor, state, num_bits=8, type="float", strategy="group", group_size=32)


def torchao() -> Iterator[Made]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    configs = {
        "float8": Float8WeightOnlyConfig(),
        "int8": Int8WeightOnlyConfig(),
        "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    for name, config in configs.items():
        layer = torch.nn.Linear(96, 12, bias=False)
        layer.weight.data = weight(12, 96)
        quantize_(layer, config)
        stored, _ = flatten_tensor_state_dict({"a.weight": layer.weight.data})
        yield f"torchao-{name}", stored, {"a.weight": layer.weight.data.dequantize()}, {"quant_method": "torchao"}


def hqq() -> Iterator[Made]:
    from hqq.core.quantize import Quantizer
    from hqq.core.utils import encode_safetensor_type

    for bits in (8, 4, 3, 2, 1):
        for axis in (0, 1):
            W = weight(24, 96)
            codes, meta = Quantizer.quantize(W, nbits=bits, group_size=32, axis=axis, device="cpu", optimize=False)
            expected = Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})
            stored = {"a.W_q": codes} | {f"a.{name}": encode_safetensor_type(value) for name, value in meta.items()}
            yield f"hqq-{bits}bit-axis{axis}", stored, {"a.weight": expected}, {"quant_method": "hqq"}


def function_of(source: Path, name: str, **given: Any) -> Callable[..., Any]:
    """The function or method `name` of a file that cannot be imported."""
    tree = ast.parse(source.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    module = ast.fix_missing_locations(ast.Module([found], []))
    exec(compile(module, str(source), "exec"), given)
    return given[name]


def stream(integers: Tensor, bits: int) -> Tensor:
    """(rows, words) int32: the integers of each row as one little-endian stream of bits."""
    rows = [sum(int(value) << (i * bits) for i, value in enumerate(row)) for row in integers.tolist()]
    count = -(-integers.shape[1] * bits // 32)
    words = [[(row >> (32 * i)) & 0xFFFFFFFF for i in range(count)] for row in rows]
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def gptq(sources: Path) -> Iterator[Made]:
    """Words are packed here; what they stand for is gptqmodel's word."""
    file = sources / "gptqmodel" / "nn_modules" / "qlinear" / "__init__.py"
    right, left = torch.bitwise_right_shift, torch.bitwise_left_shift
    dequantise = function_of(file, "dequantize_weight", t=torch, _torch_right_shift=right, _torch_left_shift=left)
    finish = function_of(file, "_dequantize_from_codes", t=torch)
    generator = torch.Generator().manual_seed(5)
    for bits in (2, 3, 4, 8):
        for act_order in (False, True):
            codes = torch.randint(0, 1 << bits, (64, 32), generator=generator)
            zeros = torch.randint(1, 1 << bits, (2, 32), generator=generator)
            scales = (torch.rand(2, 32, generator=generator) * 0.01 + 0.001).half()
            index = torch.randint(0, 2, (64,), generator=generator) if act_order else torch.arange(64) // 32
            words, points = stream(codes.T, bits).T.contiguous(), stream(zeros, bits)
            shifts = torch.tensor([list(range(0, 32, bits))], dtype=torch.int32)
            if bits == 3:
                shifts = torch.tensor(
                    [
                        [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0],
                        [0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31],
                        [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0],
                    ],
                    dtype=torch.int32,
                ).reshape(1, 3, 12)
            layer = types.SimpleNamespace(
                planar=False,
                bits=bits,
                maxq=(1 << bits) - 1,
                pack_factor=32 // bits,
                dequant_dtype=torch.int16 if bits == 8 else torch.int8,
                qweight=words,
                qzeros=points,
                scales=scales,
                g_idx=index.int(),
                in_features=64,
                wf_unsqueeze_zero=shifts.unsqueeze(0),
                wf_unsqueeze_neg_one=shifts.unsqueeze(-1),
                _init_wf_unsqueeze_buffers=lambda: None,
            )
            layer._dequantize_from_codes = lambda weight, zeros, num_itr=1, layer=layer: finish(layer, weight, zeros, num_itr)
            expected = dequantise(layer).T.contiguous()
            for layout in ("gptq", "gptq_v2"):
                held = stream(zeros - 1, bits) if layout == "gptq" else points
                stored = {"a.qweight": words, "a.qzeros": held, "a.scales": scales, "a.g_idx": index.int()}
                config = {
                    "quant_method": "gptq",
                    "bits": bits,
                    "group_size": 32,
                    "checkpoint_format": layout,
                    "desc_act": act_order,
                }
                yield f"{layout}-{bits}bit{'-actorder' if act_order else ''}", stored, {"a.weight": expected}, config


def awq(sources: Path) -> Iterator[Made]:
    file = sources / "awq" / "utils" / "packing_utils.py"
    space: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(-(2**31), 2**31, (64, 3), generator=generator).int()
    zeros = torch.randint(-(2**31), 2**31, (2, 3), generator=generator).int()
    scales = (torch.rand(2, 24, generator=generator) * 0.01 + 0.001).half()
    expected = space["dequantize_gemm"](words, zeros, scales, 4, 32).T.contiguous()
    stored = {"a.qweight": words, "a.qzeros": zeros, "a.scales": scales}
    yield "awq-gemm", stored, {"a.weight": expected}, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gptqmodel", type=Path)
    parser.add_argument("--autoawq", type=Path)
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], Iterator[Made]]] = {
        "bitsandbytes": bitsandbytes,
        "compressed-tensors": compressed_tensors,
        "torchao": torchao,
        "hqq": hqq,
    }
    versions = {}
    for vendor in list(makers):
        try:
            versions[vendor] = f"{vendor} {importlib.metadata.version(vendor)}"
        except importlib.metadata.PackageNotFoundError:
            print(f"{vendor} is not installed: its files stay")
            makers.pop(vendor)
    for vendor, sources, make in (("gptqmodel", given.gptqmodel, gptq), ("autoawq", given.autoawq, awq)):
        if sources is not None:
            makers[vendor], versions[vendor] = lambda make=make, sources=sources: make(sources), sources.name
    for vendor, make in makers.items():
        size = 0
        for name, stored, expected, config in make():
            tensors = {f"stored.{each}": tensor for each, tensor in stored.items()}
            tensors |= {f"expected.{each}": tensor for each, tensor in expected.items()}
            metadata = {"made_by": versions[vendor], "config": json.dumps(config)}
            path = FOLDER / f"{name}.safetensors"
            save_file({each: tensor.detach().contiguous().clone() for each, tensor in tensors.items()}, path, metadata)
            size += path.stat().st_size
        print(f"{versions[vendor]}: {math.ceil(size / 1024)} KiB")
        if vendor == "bitsandbytes":
            loaded_by_bitsandbytes()


if __name__ == "__main__":
    main()

"""A base and an adapter of each kind that is read, of a chosen size, with random numbers: what `kinds.py` merges.

    python benchmarks/kinds_made.py base llama tiny benchmarks/data/tiny-base
    python benchmarks/kinds_made.py adapter dora benchmarks/data/tiny-base benchmarks/data/tiny-dora

Bases of other modules than a Llama's have its number of parameters. Adapters are written as PEFT and LyCORIS write them, with ‖ΔW‖
near a hundredth of ‖W‖.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from synthetic import RELATIVE_UPDATE, SHAPES, SHARD_BYTES, STD, Shape, make_base
from torch import Tensor

R = 16
SCALING = 2.0
SMOLLM2 = "smollm2"
SMOL_SHAPE = Shape(576, 30, 1536, 9, 3, 49152)  # of SmolLM2-135M, whose head is its embedding
HELD_EXPERTS = 8
Sizes = Mapping[str, tuple[int, ...]]


def parameters(size: str) -> int:
    """Number of parameters of the Llama of that size."""
    shape = SMOL_SHAPE if size == SMOLLM2 else SHAPES[size]
    tied = shape.vocabulary * shape.hidden if size == SMOLLM2 else 0
    return sum(math.prod(each) for _, each in shape.tensors()) - tied


def sizes(base: str, size: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a base of that kind, with as many numbers as the Llama of that size."""
    small = size == "tiny"
    block = _BLOCKS[base](256 if small else 1024)
    count = max(1, round(parameters(size) / sum(math.prod(each) for each in block.values()) / (4 if base == "groups" else 1)))
    return {name.format(i): each for i in range(count) for name, each in block.items()}


def _experts(d: int) -> dict[str, tuple[int, ...]]:
    place = "model.layers.{}.mlp.experts"
    each = {"gate_proj": (d // 2, d), "up_proj": (d // 2, d), "down_proj": (d, d // 2)}
    return {f"{place}.{j}.{name}.weight".replace("{}", "{0}"): shape for j in range(HELD_EXPERTS) for name, shape in each.items()}


_BLOCKS: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {
    "convs": lambda d: {"blocks.{}.weight": (d // 2, d // 2, 3, 3), "blocks.{}.bias": (d // 2,)},
    "groups": lambda d: {"blocks.{}.weight": (d // 2, d // 8, 3, 3), "blocks.{}.bias": (d // 2,)},
    "attention": lambda d: {
        "blocks.{}.in_proj_weight": (3 * d, d), "blocks.{}.in_proj_bias": (3 * d,),
        "blocks.{}.out_proj.weight": (d, d), "blocks.{}.out_proj.bias": (d,),
    },
    "transposed": lambda d: {
        "h.{}.attn.c_attn.weight": (d, 3 * d), "h.{}.attn.c_attn.bias": (3 * d,), "h.{}.attn.c_proj.weight": (d, d),
        "h.{}.attn.c_proj.bias": (d,), "h.{}.mlp.c_fc.weight": (d, 4 * d), "h.{}.mlp.c_fc.bias": (4 * d,),
        "h.{}.mlp.c_proj.weight": (4 * d, d), "h.{}.mlp.c_proj.bias": (d,),
    },
    "stacks": lambda d: {
        "model.layers.{}.mlp.experts.gate_up_proj": (HELD_EXPERTS, d, d),
        "model.layers.{}.mlp.experts.down_proj": (HELD_EXPERTS, d, d // 2),
    },
    "experts": _experts,
    "biased": lambda d: {f"blocks.{{}}.lin{i}.{name}": shape for i in range(4) for name, shape in
                         (("weight", (d, d)), ("bias", (d,)))},
}  # fmt: skip
LINEAR = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
QUANTISED = ("fp8", "nf4", "mxfp4", "q8_0.gguf", "q4_k.gguf")
"""Bases that are a Llama whose linear layers are quantised, as DeepSeek, bitsandbytes, compressed-tensors and llama.cpp do."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CONFIGS: dict[str, dict[str, Any]] = {
    "transposed": {"model_type": "gpt2", "architectures": ["GPT2Model"]},
    "stacks": {"model_type": "qwen3_moe"},
    "experts": {"model_type": "qwen3_moe"},
}


def write_base(base: str, size: str, out: Path) -> None:
    """A base in bfloat16, in files of at most `SHARD_BYTES`."""
    if base == "llama" and size == SMOLLM2:
        sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
        import smollm2

        smollm2.make_base(out)
        return
    if base == "llama":
        make_base(SHAPES[size], out)
        return
    if base.endswith(".gguf"):
        _write_gguf(base.removesuffix(".gguf").upper(), size, out)
        return
    if base in QUANTISED:
        _quantise(base, size, out)
        return
    generator = torch.Generator().manual_seed(0)
    files: list[dict[str, Tensor]] = [{}]
    for name, shape in sizes(base, size).items():
        if sum(each.nbytes for each in files[-1].values()) > SHARD_BYTES:
            files.append({})
        files[-1][name] = (torch.randn(shape, generator=generator) * STD).to(torch.bfloat16)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for i, held in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        save_file(held, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (partial / "config.json").write_text(json.dumps(CONFIGS.get(base, {})))
    partial.rename(out)


def _quantise(base: str, size: str, out: Path) -> None:
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_base("llama", size, partial)
    weight_map: dict[str, str] = {}
    for path in sorted(partial.glob("*.safetensors")):
        held: dict[str, Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                held |= _WEIGHTS[base](name, weight) if name.endswith(LINEAR) else {name: weight}
        save_file(held, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, path.name)
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((partial / "config.json").read_text())
    (partial / "config.json").write_text(json.dumps(config | {"quantization_config": _SETTINGS[base]}))
    partial.rename(out)


def _write_gguf(kind: str, size: str, out: Path) -> None:
    """One file; codes and scales are random, and stand for numbers of the size of others'. Where rows are no whole blocks of 256,
    Q5_0 is in the place of Q4_K, as llama.cpp does it.
    """
    import gguf
    import numpy as np

    shape = SMOL_SHAPE if size == SMOLLM2 else SHAPES[size]
    generator = np.random.default_rng(0)
    names, partial = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers), out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_type("model")
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    for name, sizes_of_it in shape.tensors():
        called = names.get_name(name, (".weight",))
        if len(sizes_of_it) < 2:
            writer.add_tensor(called, np.ones(sizes_of_it, np.float32))
            continue
        rows, columns = sizes_of_it
        own = "Q5_0" if kind == "Q4_K" and columns % 256 else kind
        number = gguf.GGMLQuantizationType[own]
        numel, nbytes = gguf.GGML_QUANT_SIZES[number]
        words = generator.integers(0, 256, (rows, columns // numel, nbytes), dtype=np.uint8)
        scale = {"Q8_0": STD / 74, "Q5_0": STD / 9, "Q4_K": STD / 250}[own]  # a code is 74, 9, 4.6 off its mean
        for at in (0, 2) if own == "Q4_K" else (0,):
            words[..., at : at + 2] = np.float16(scale).reshape(1).view(np.uint8)
        writer.add_tensor(called, words.reshape(rows, -1), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def _fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Blocks of 128 × 128, the last of them cut short."""
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = whole.view(whole.shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None].clamp(min=1e-12)).reshape(whole.shape)[:rows, :columns]
    return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def _nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Blocks of 64 in the order of rows, the first of two codes in the high half of a byte."""
    table, blocks = torch.tensor(NF4), weight.float().view(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = torch.bucketize(blocks / absmax[:, None], (table[:-1] + table[1:]) / 2).to(torch.uint8).view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    said = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: (codes[:, 0] << 4 | codes[:, 1])[:, None], f"{name}.absmax": absmax, f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": said,
    }  # fmt: skip


def _mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Blocks of 32 along a row with a power of two each, the first of two codes in the low half of a byte."""
    sizes, blocks = torch.tensor(E2M1), weight.float().view(weight.shape[0], -1, 32)
    powers = torch.frexp(blocks.abs().amax(-1)).exponent - 3  # the largest number is 4 or more times them, and less than 8
    sums = torch.ldexp(blocks, -powers[..., None])
    codes = torch.bucketize(sums.abs().contiguous(), (sizes[:-1] + sizes[1:]) / 2).to(torch.uint8) | (sums < 0).to(torch.uint8) << 3
    pairs = codes.view(weight.shape[0], -1, 2)
    return {f"{name}_packed": pairs[..., 0] | pairs[..., 1] << 4, f"{name}_scale": (powers + 127).to(torch.uint8)}


_WEIGHTS: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {"fp8": _fp8, "nf4": _nf4, "mxfp4": _mxfp4}
_SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "mxfp4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
}


@dataclass
class Made:
    """What is written of an adapter for `base`: tensors, and fields of its configuration, none where it is a file of LyCORIS's."""

    base: Path
    seed: int = 1
    tensors: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lycoris: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.files: dict[str, tuple[Path, tuple[int, ...]]] = {}
        for path in sorted(self.base.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.files |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118

    def shapes(self, *ends: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names, without their ``.weight``, and shapes of the base's tensors of those ends."""
        for name, (_, shape) in sorted(self.files.items()):
            if name.endswith(ends):
                yield name.removesuffix(".weight"), shape

    def weight(self, name: str) -> Tensor:
        path, _ = self.files[name]
        with safe_open(path, "pt") as file:
            held: Tensor = file.get_tensor(name)
        return held.float()

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def pair(self, rows: int, columns: int, r: int = R) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B of an update of that size."""
        std = RELATIVE_UPDATE * STD * math.sqrt(columns / r) / SCALING
        return self.normal(r, columns, std=columns**-0.5), self.normal(rows, r, std=std)

    def put(self, module: str, A: Tensor, B: Tensor) -> None:
        self.tensors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}


TARGETS = [name.removesuffix(".weight") for name in LINEAR]


def plain(made: Made) -> None:
    for module, (rows, columns) in made.shapes(*LINEAR):
        made.put(module, *made.pair(rows, columns))
    made.config = {"target_modules": TARGETS}


def dora(made: Made) -> None:
    plain(made)
    for module, (rows, _) in made.shapes(*LINEAR):
        norm = torch.linalg.vector_norm(made.weight(f"{module}.weight"), dim=1)
        made.tensors[f"base_model.model.{module}.lora_magnitude_vector"] = norm * (1 + made.normal(rows, std=0.01))
    made.config["use_dora"] = True


def dora_of_lycoris(dim: int) -> Callable[[Made], None]:
    """By output where the norm is along `dim` 1, by input where it is along 0."""

    def make(made: Made) -> None:
        made.lycoris = True
        for module, (rows, columns) in made.shapes(*LINEAR):
            A, B = made.pair(rows, columns)
            norm = torch.linalg.vector_norm(made.weight(f"{module}.weight"), dim=dim, keepdim=True)
            name = f"lycoris_{module.replace('.', '_')}"
            made.tensors |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor(SCALING * R)}
            made.tensors[f"{name}.dora_scale"] = norm * (1 + made.normal(*norm.shape, std=0.01))

    return make


def rows(made: Made) -> None:
    plain(made)
    ((module, (count, width)),) = made.shapes("embed_tokens.weight")
    chosen = list(range(1, count, count // 64))
    made.tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = made.normal(len(chosen), width, std=STD)
    made.config["trainable_token_indices"] = {"embed_tokens": chosen}


def replaced(made: Made) -> None:
    plain(made)
    for module, (count, width) in made.shapes("embed_tokens.weight", "lm_head.weight"):
        made.tensors[f"base_model.model.{module}.weight"] = made.normal(count, width, std=STD).to(torch.bfloat16)
        made.config.setdefault("modules_to_save", []).append(module.rpartition(".")[2])


def embedding(made: Made) -> None:
    plain(made)
    ((module, (count, width)),) = made.shapes("embed_tokens.weight")
    A, B = made.pair(width, count)
    made.tensors |= {f"base_model.model.{module}.lora_embedding_{which}": value for which, value in (("A", A), ("B", B))}
    made.config["target_modules"] = [*TARGETS, "embed_tokens"]


def biases(made: Made) -> None:
    for module, (count, width) in made.shapes(".weight"):
        made.put(module, *made.pair(count, width))
        made.tensors[f"base_model.model.{module}.lora_B.bias"] = made.normal(count, std=STD)
    made.config = {"target_modules": [f"lin{i}" for i in range(4)], "lora_bias": True}


def convolutions(made: Made) -> None:
    for module, (out, inner, *kernel) in made.shapes(".weight"):
        groups = out // inner  # (out, in / groups, …), and as many outputs as inputs
        A, B = made.pair(out, out * math.prod(kernel))
        made.put(module, A.reshape(R, out, *kernel), B[:, : R // groups].reshape(out, R // groups, *(1 for _ in kernel)).clone())
    made.config = {"target_modules": r"blocks\.\d+"}


def attention(made: Made) -> None:
    for module, (out, inner) in made.shapes("in_proj_weight"):
        place = module.removesuffix(".in_proj_weight")
        made.put(place, *made.pair(out, inner))
        made.put(f"{place}.base_layer.out_proj", *made.pair(inner, inner))
    made.config = {"target_modules": r"blocks\.\d+", "peft_version": "0.21.2"}


def transposed(made: Made) -> None:
    for module, (inner, out) in made.shapes(".weight"):
        made.put(module, *made.pair(out, inner))
    made.config = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}


def stacks(made: Made) -> None:
    """As PEFT trains parameters: of one base, or of the stacks that another has in pieces."""
    if any(name.endswith("gate_up_proj") for name in made.files):
        found = dict(made.shapes("gate_up_proj", "down_proj"))
    else:
        pieces = dict(made.shapes(".0.gate_proj.weight", ".0.down_proj.weight"))
        found = {
            name.replace(".0.gate_proj", ".gate_up_proj").replace(".0.down_proj", ".down_proj"): (
                HELD_EXPERTS, shape[0] * (2 if "gate" in name else 1), shape[1],
            )
            for name, shape in pieces.items()
        }  # fmt: skip
    for name, (experts, out, inner) in found.items():
        place, _, leaf = name.rpartition(".")
        A, B = made.pair(out, inner)
        A, B = torch.cat([A + made.normal(*A.shape, std=0.01) for _ in range(experts)]), B.repeat_interleave(experts, 1)
        made.put(f"{place}.base_layer" if leaf == "gate_up_proj" else place, A, B)
    made.config = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def experts(made: Made) -> None:
    for module, (out, inner) in made.shapes(".weight"):
        made.put(module, *made.pair(out, inner))
    made.config = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}


def loha(made: Made) -> None:
    for module, (out, inner) in made.shapes(*LINEAR):
        std = math.sqrt(RELATIVE_UPDATE * STD / SCALING / R)
        for i in (1, 2):
            a, b = made.normal(out, R, std=std), made.normal(R, inner)
            made.tensors |= {f"base_model.model.{module}.hada_w{i}_a": a, f"base_model.model.{module}.hada_w{i}_b": b}
    made.config = {"peft_type": "LOHA", "alpha": SCALING * R, "target_modules": TARGETS}


def lokr(made: Made) -> None:
    from peft.tuners.lokr.layer import factorization

    for module, (out, inner) in made.shapes(*LINEAR):
        (out_l, out_k), (in_m, in_n) = factorization(out, -1), factorization(inner, -1)
        std = RELATIVE_UPDATE * STD / SCALING
        held = {"lokr_w1": made.normal(out_l, in_m, std=std)}
        if max(out_k, in_n) / 2 > R:  # as PEFT decides it
            held |= {"lokr_w2_a": made.normal(out_k, R, std=R**-0.5), "lokr_w2_b": made.normal(R, in_n)}
        else:
            held["lokr_w2"] = made.normal(out_k, in_n)
        made.tensors |= {f"base_model.model.{module}.{name}": value for name, value in held.items()}
    made.config = {"peft_type": "LOKR", "alpha": SCALING * R, "target_modules": TARGETS}


def oft(made: Made) -> None:
    from lycoris.functional import factorization  # type: ignore[import-untyped]

    made.lycoris = True
    for module, (out, _) in made.shapes(*LINEAR):
        _rotate(made, module, factorization(out, R), ())


def boft(made: Made) -> None:
    from lycoris.functional import power2factorization

    made.lycoris = True
    for module, (out, _) in made.shapes(*LINEAR):
        size, count = power2factorization(out, 2 * R)
        _rotate(made, module, (size, count), ((count - 1).bit_count() + 1,))  # stages as LyCORIS counts them


def _rotate(made: Made, module: str, blocks: tuple[int, int], stages: tuple[int, ...]) -> None:
    (size, count), name = blocks, f"lycoris_{module.replace('.', '_')}"
    held = made.normal(*stages, count, size, size, std=0.001)
    made.tensors |= {f"{name}.oft_blocks": held, f"{name}.alpha": torch.tensor(0.0)}


def glora(made: Made) -> None:
    made.lycoris = True
    for module, (out, inner) in made.shapes(*LINEAR):
        name = f"lycoris_{module.replace('.', '_')}"
        sizes = {"a1": (inner, R), "a2": (R, inner), "b1": (out, R), "b2": (R, inner)}
        made.tensors |= {f"{name}.{part}.weight": made.normal(*size, std=0.01) for part, size in sizes.items()}
        made.tensors[f"{name}.alpha"] = torch.tensor(float(R))


def ia3(made: Made) -> None:
    made.lycoris = True
    for module, (out, _) in made.shapes(*LINEAR):
        name = f"lycoris_{module.replace('.', '_')}"
        made.tensors |= {f"{name}.weight": made.normal(out, std=0.01), f"{name}.on_input": torch.tensor(0.0)}


def residual(init: str) -> Callable[[Made], None]:
    def make(made: Made) -> None:
        plain(made)
        made.config["init_lora_weights"] = init

    return make


def kasa(made: Made) -> None:
    plain(made)
    for module, _ in made.shapes(*LINEAR):
        made.tensors[f"base_model.model.{module}.lora_diag"] = 1 + made.normal(R, std=0.1)
    made.config["kasa_config"] = {}


def replication(made: Made) -> None:
    """A model of half as many layers again."""
    count = 1 + max(int(name.split(".")[2]) for name in made.files if name.startswith("model.layers."))
    origins = [*range(count), *range(count // 2)]
    shapes = dict(made.shapes(*LINEAR))
    for i, origin in enumerate(origins):
        for module, (out, inner) in shapes.items():
            if module.startswith(f"model.layers.{origin}."):
                made.put(module.replace(f".{origin}.", f".{i}.", 1), *made.pair(out, inner))
    made.config = {"target_modules": TARGETS, "layer_replication": [[0, count], [0, count // 2]]}


ADAPTERS: dict[str, Callable[[Made], None]] = {
    "plain": plain, "several": plain, "dora": dora, "dora-lycoris": dora_of_lycoris(1), "dora-by-input": dora_of_lycoris(0),
    "rows": rows, "replaced": replaced, "embedding": embedding, "biases": biases, "conv": convolutions, "groups": convolutions,
    "mha": attention, "transposed": transposed, "stacks": stacks, "stacks-apart": stacks, "experts": experts, "loha": loha,
    "lokr": lokr, "pissa": residual("pissa"), "olora": residual("olora"), "kasa": kasa, "replication": replication,
    "oft": oft, "boft": boft, "glora": glora, "ia3": ia3,
    **dict.fromkeys((f"{base}-{to}" for base in QUANTISED for to in ("bf16", "same")), plain),
}  # fmt: skip
"""By the names that `kinds.py` has of them."""


def write_adapter(kind: str, base: Path, out: Path, seed: int) -> None:
    """An adapter of that kind for `base`."""
    made = Made(base, seed)
    ADAPTERS[kind](made)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if not made.lycoris:
        config = {"peft_type": "LORA", "r": R, "lora_alpha": SCALING * R, "bias": "none", "inference_mode": True, **made.config}
        if config["peft_type"] != "LORA":
            config = {name: value for name, value in config.items() if name not in ("lora_alpha", "bias")}
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2))
    name = "lycoris.safetensors" if made.lycoris else "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in made.tensors.items()}, partial / name, metadata={"format": "pt"})
    partial.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "adapter"])
    parser.add_argument("kind", help="of the base or of the adapter")
    parser.add_argument("origin", help="size of the base; or the base's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.what == "base":
        write_base(given.kind, given.origin, given.out)
    else:
        write_adapter(given.kind, Path(given.origin), given.out, given.seed)

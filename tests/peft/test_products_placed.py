"""LoHa and LoKr where their weight is not stored as they see it: transposed (GPT-2's Conv1D), fused with others, in parts, and with
the rows of queries and keys in llama.cpp's order. What they add is PEFT's and LyCORIS's own ΔW, placed by hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import lorafold
from lorafold.errors import UnmatchedAdapterError
from models import gpt2, llama, save_base, tensors

Deltas = Mapping[str, Tensor]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LoHa", {"r": 2, "alpha": 5}),
    "LoKr": ("LoKr", {"r": 2, "alpha": 5}),
    "LoKr, both decomposed": ("LoKr", {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "LoKr, both whole": ("LoKr", {"r": 64, "alpha": 3}),
    "LyCORIS's LoHa": ("loha", {"lora_dim": 2, "alpha": 1.0}),
    "LyCORIS's LoKr": ("lokr", {"lora_dim": 2, "alpha": 1.0, "factor": 4}),
}
of_any_kind = pytest.mark.parametrize("kind", KINDS)

GPT2 = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (40, 32), "mlp.c_proj": (32, 40)}
APART = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "mlp.gate_proj": (40, 32), "mlp.up_proj": (40, 32),
}  # fmt: skip
FUSED = {"self_attn.qkv_proj": (64, 32), "mlp.gate_up_proj": (80, 32)}
PARTS = {"self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
PARTS["mlp.gate_up_proj"] = ["mlp.gate_proj", "mlp.up_proj"]


def trained(path: Path, kind: str, before: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[Path, Deltas]:
    """An adapter on linear layers of these names in two blocks, and the ΔW of each, (out, in) float64."""
    name, config = KINDS[kind]
    layers = {f"{before}.{i}.{each}": shape for i in (0, 1) for each, shape in shapes.items()}
    return (of_peft if name[0] == "L" else of_lycoris)(path, name, config, layers)


def of_peft(path: Path, name: str, config: dict[str, Any], layers: Mapping[str, tuple[int, int]]) -> tuple[Path, Deltas]:
    import peft

    torch.manual_seed(3)
    root = nn.Module()
    for module, (out, inner) in layers.items():
        at, parts = root, module.split(".")
        for part in parts[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(parts[-1], nn.Linear(inner, out, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(peft, f"{name}Config")(target_modules=list(layers), init_weights=False, **config)
        wrapped = peft.get_peft_model(root, made)
        wrapped.save_pretrained(path)
    found = {n: each for n, each in wrapped.base_model.model.named_modules() if hasattr(each, "get_delta_weight")}
    return path, {n: each.get_delta_weight("default").detach().double() for n, each in found.items()}


def of_lycoris(path: Path, name: str, config: dict[str, Any], layers: Mapping[str, tuple[int, int]]) -> tuple[Path, Deltas]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an optional compiler that is not there
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule

    torch.manual_seed(3)
    held, deltas = {}, {}
    for module, (out, inner) in layers.items():
        layer = nn.Linear(inner, out, bias=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = (LohaModule if name == "loha" else LokrModule)("x", layer, 1.0, **config)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.3)
        held |= {f"lycoris_{module.replace('.', '_')}.{n}": t.clone().contiguous() for n, t in made.state_dict().items()}
        deltas[module] = made.get_weight(layer.weight.shape).detach().double()
    save_file(held, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors"), deltas


def check(found: Mapping[str, Tensor], base: Mapping[str, Tensor], deltas: Deltas) -> None:
    """Their ΔW is computed in float32, and what is found is rounded to it: 2⁻²⁰ of numbers below 2."""
    for name, delta in deltas.items():
        assert delta.norm() > 0.01
        wanted = base[f"{name}.weight"].double() + delta
        assert (found[f"{name}.weight"].double() - wanted).abs().max() < 2.0**-20, name


def refused(base: Path, adapter: Path) -> bool:
    """Whether its names have underscores alone, in which nobody finds what is fused: that is said of each."""
    if adapter.suffix != ".safetensors":
        return False
    with pytest.raises(UnmatchedAdapterError, match=r"none of the \d+ adapter modules has a tensor") as raised:
        lorafold.plan(base, [adapter])
    assert "lycoris_model_layers_0_mlp_g" in str(raised.value)
    return True


def merged(base: Path, adapter: Path, out: Path, model: Any) -> Mapping[str, Tensor]:
    """What files become, which is what the model in memory becomes."""
    lorafold.merge(base, [adapter], out)
    found = tensors(out)
    with lorafold.merge_into(model, [adapter]):
        held = model.state_dict()
        assert all(torch.equal(held[name], value) for name, value in found.items())
    return found


@of_any_kind
def test_gpt2_stores_its_weights_transposed(tmp_path: Path, kind: str) -> None:
    base, model = save_base(gpt2(), tmp_path / "base", torch.float32), gpt2()
    adapter, deltas = trained(tmp_path / "adapter", kind, "transformer.h", GPT2)
    check(merged(base, adapter, tmp_path / "out", model), tensors(base), {name: delta.T for name, delta in deltas.items()})


def phi3() -> Any:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


@of_any_kind
def test_trained_apart_on_weights_that_are_fused(tmp_path: Path, kind: str) -> None:
    base = save_base(phi3(), tmp_path / "base", torch.float32)
    adapter, deltas = trained(tmp_path / "adapter", kind, "model.layers", APART)
    if refused(base, adapter):
        return
    joined = {
        f"model.layers.{i}.{name}": torch.cat([deltas[f"model.layers.{i}.{part}"] for part in parts])
        for i in (0, 1)
        for name, parts in PARTS.items()
    }
    check(merged(base, adapter, tmp_path / "out", phi3()), tensors(base), joined)


@of_any_kind
def test_trained_fused_on_weights_that_are_apart(tmp_path: Path, kind: str) -> None:
    base = save_base(llama(), tmp_path / "base", torch.float32)
    adapter, deltas = trained(tmp_path / "adapter", kind, "model.layers", FUSED)
    if refused(base, adapter):
        return
    cut = {}
    for name, parts in PARTS.items():
        for i in (0, 1):
            pieces = deltas[f"model.layers.{i}.{name}"].split([APART[part][0] for part in parts])
            cut |= {f"model.layers.{i}.{part}": piece for part, piece in zip(parts, pieces, strict=True)}
    check(merged(base, adapter, tmp_path / "out", llama()), tensors(base), cut)


@of_any_kind
def test_with_the_rows_of_llama_cpp(tmp_path: Path, kind: str) -> None:
    """As LoRA in GGUF, whose queries and keys have rows in the other order: exact in float64 only, so rounding is asked for."""
    base = save_base(llama(), tmp_path / "base", torch.float32)
    adapter, deltas = trained(tmp_path / "adapter", kind, "model.layers", APART)
    with pytest.raises(lorafold.LorafoldError, match="need float64"):
        lorafold.convert(adapter, tmp_path / "adapter.gguf", "gguf", base=base)
    lorafold.convert(adapter, tmp_path / "adapter.gguf", "gguf", base=base, allow_rounding=True)
    check(merged(base, tmp_path / "adapter.gguf", tmp_path / "out", llama()), tensors(base), deltas)

"""There and back: the update of every adapter is the same number, not a near one, through each format that can hold it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import formats
from lorafold.adapters.adapter import Adapter, Base, on_base
from lorafold.adapters.formats.table import WRITTEN
from lorafold.adapters.load import load_adapter
from lorafold.adapters.numbers import AdapterReader
from lorafold.adapters.read_options import ReadOptions
from lorafold.api.converting import convert
from lorafold.errors import UnsupportedAdapterError

Exact = dict[str, list[list[Fraction]]]


def exactly(adapter: Adapter) -> Exact:
    """ΔW of each module as exact numbers, seen as a matrix; an embedding's is (num_embeddings, dims)."""
    found = {}
    with AdapterReader(adapter) as reader:
        for name, module in adapter.modules.items():
            update = reader.update(module)
            A, B = update.lora_A.double().tolist(), update.lora_B.double().tolist()
            scaling = Fraction(update.scaling)
            columns = list(zip(*A, strict=True))
            found[name] = [
                [
                    scaling * sum((Fraction(b) * Fraction(a) for b, a in zip(row, column, strict=True)), Fraction(0))
                    for column in columns
                ]
                for row in B
            ]
    return found


def on(path: Path, base: Path, **options: Any) -> Adapter:
    """The adapter at `path` as it is on `base`."""
    config = json.loads((base / "config.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
    return on_base(load_adapter(path, ReadOptions(allow_pickle=True, **options)), Base(config, shapes))


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"]
SIZES = {name: formats.SHAPES.get(name.partition("layers.")[2][2:], (formats.VOCAB, formats.WIDTH)) for name in NAMES}


@st.composite
def adapters(draw: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and configuration of a PEFT adapter with ranks, alphas and types of all kinds."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    rslora = draw(st.booleans())
    tensors, ranks, alphas = {}, {}, {}
    for name in names:
        r = ranks[name] = draw(st.sampled_from([1, 2, 3, 4]))
        alphas[name] = draw(st.sampled_from([8, 16, 4, 2, 0.5, 3.0, 0.1, -8, 7, 0]))
        out, inner = SIZES[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, inner).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, r).to(dtype)
    if draw(st.booleans()):
        r = draw(st.sampled_from([2, 3]))
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(r, formats.VOCAB).to(dtype)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(formats.WIDTH, r).to(dtype)
        ranks["model.embed_tokens"], alphas["model.embed_tokens"] = r, 8
    config = {
        "peft_type": "LORA", "r": 99, "lora_alpha": 99, "rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": rslora,
        "base_model_name_or_path": "a/base",
    }  # fmt: skip
    return tensors, config


def saved(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=40, deadline=None)
@given(held=adapters(), target=st.sampled_from(sorted(WRITTEN)))
def test_there_and_back_is_the_same_update(
    tmp_path_factory: pytest.TempPathFactory, held: tuple[dict[str, torch.Tensor], dict[str, Any]], target: str
) -> None:
    folder = tmp_path_factory.mktemp("round")
    base = formats.base(folder / "base")
    first = saved(folder / "first", *held)
    out = folder / {"loralib": "out.pt", "gguf": "out.gguf", "kohya": "out.safetensors", "diffusers": "out.safetensors"}.get(
        target, "out"
    )
    options = {"base": base if target in ("gguf", "loralib") else None}
    refusal = ""
    try:
        done = convert(first, out, target, read_options=ReadOptions(component="unet"), **options)
    except UnsupportedAdapterError as error:
        refusal = str(error)
    if refusal:
        assert ("embeddings" if target in ("kohya", "diffusers") else "go into lora_B") in refusal
        assert target != "peft"
        assert not out.exists()
        return
    alpha = next((float(note.rpartition("lora_alpha=")[2].split(")")[0]) for note in done.notes if "(lora_alpha=" in note), None)
    wanted = exactly(load_adapter(first))
    if target in ("kohya", "diffusers"):
        found = exactly(load_adapter(out))
        spelled = {f"lora_unet_{n.replace('.', '_')}" if target == "kohya" else f"unet.{n}": delta for n, delta in wanted.items()}
        assert found == spelled
    else:
        assert exactly(on(out, base, lora_alpha=alpha)) == wanted
        again = convert(out, folder / "again", "peft", base=base, read_options=ReadOptions(lora_alpha=alpha, allow_pickle=True))
        assert (again.source, again.target) == (target, "peft")
        assert exactly(load_adapter(folder / "again")) == wanted


def test_dora_biases_rows_and_whole_tensors(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 8), f"base_model.model.{name}.lora_B.weight": torch.randn(8, 2),
        f"base_model.model.{name}.lora_magnitude_vector": torch.rand(8), f"base_model.model.{name}.lora_B.bias": torch.rand(8),
        "base_model.model.lm_head.weight": torch.randn(11, 8),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 8),
    }  # fmt: skip
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_dora": True, "lora_bias": True, "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [3, 5]},
    }  # fmt: skip
    first = saved(tmp_path / "first", tensors, config)
    convert(first, tmp_path / "second", "peft")
    assert_same(load_adapter(first), load_adapter(tmp_path / "second"))
    for target, out in (("mlx", "no"), ("gguf", "a.gguf"), ("loralib", "a.pt"), ("kohya", "a.safetensors")):
        out = tmp_path / out
        with pytest.raises(UnsupportedAdapterError, match="has no place; lost would be"):
            convert(first, out, target, base=formats.base(tmp_path / "base"), read_options=ReadOptions(component="unet"))
        assert not out.exists()


def assert_same(one: Adapter, other: Adapter) -> None:
    assert exactly(one) == exactly(other)
    with AdapterReader(one) as a, AdapterReader(other) as b:
        for name, module in one.modules.items():
            for part in ("magnitude", "lora_bias"):
                assert torch.equal(a.matrix(getattr(module, part)), b.matrix(getattr(other.modules[name], part)))
        for name, info in one.replacements.items():
            assert torch.equal(a.tensor(info), b.tensor(other.replacements[name]))
        for name, rows in one.rows.items():
            assert rows.indices == other.rows[name].indices
            assert torch.equal(a.tensor(rows.values), b.tensor(other.rows[name].values))


def test_dora_of_mlx(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    folder.mkdir()
    held = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(held))
    names = {"model.embed_tokens": (11, 8), "model.layers.0.mlp.up_proj": (8, 6)}
    tensors = {}
    for name, (first, second) in names.items():
        tensors |= {f"{name}.lora_a": torch.randn(first, 2), f"{name}.lora_b": torch.randn(2, second)}
        tensors[f"{name}.m"] = torch.rand(first if "embed" in name else second)
    save_file(tensors, folder / "adapters.safetensors")
    base = formats.base(tmp_path / "base")
    convert(folder, tmp_path / "second", "mlx", base=base)
    again = load_file(tmp_path / "second" / "adapters.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in again)
    with pytest.raises(UnsupportedAdapterError, match="rows of an embedding"):
        convert(folder, tmp_path / "third", "peft", base=base)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("target", ["peft", "kohya", "diffusers"])
def test_convolutions(tmp_path: Path, target: str, dora: bool) -> None:
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.randn(2, 3, 3, 3),
        "base_model.model.conv.lora_B.weight": torch.randn(4, 2, 1, 1),
        "base_model.model.line.lora_A.weight": torch.randn(2, 3, 5), "base_model.model.line.lora_B.weight": torch.randn(4, 2, 1),
    }  # fmt: skip
    magnitudes = {
        "base_model.model.conv.lora_magnitude_vector": torch.rand(1, 4, 1, 1),
        "base_model.model.line.lora_magnitude_vector": torch.rand(1, 4, 1),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_rslora": True, "use_dora": dora}
    first = saved(tmp_path / "first", {**tensors, **magnitudes} if dora else tensors, config)
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    if dora and target == "kohya":
        with pytest.raises(UnsupportedAdapterError, match="DoRA's magnitudes"):
            convert(first, out, target, read_options=ReadOptions(component="unet"))
        return
    convert(first, out, target, read_options=ReadOptions(component="unet"))
    wanted = exactly(load_adapter(first))
    prefix = {"peft": "", "kohya": "lora_unet_", "diffusers": "unet."}[target]
    back = load_adapter(out)
    assert exactly(back) == {f"{prefix}{name}": delta for name, delta in wanted.items()}
    if dora:
        held = load_file(out if target == "diffusers" else out / "adapter_model.safetensors")
        shapes = sorted(tuple(tensor.shape) for name, tensor in held.items() if "magnitude" in name)
        assert shapes == [(1, 4, 1), (1, 4, 1, 1)]


def test_products_become_two_factors(tmp_path: Path) -> None:
    """LoHa's update is LoRA's of the product of its ranks; its factors are exact as long as float32 holds them."""
    torch.manual_seed(0)
    parts = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 3), "hada_w2_a": (4, 2), "hada_w2_b": (2, 3)}
    held = {f"lora_unet_fc.{part}": formats.numbers(*shape) for part, shape in parts.items()}
    save_file({**held, "lora_unet_fc.alpha": torch.tensor(1.0)}, tmp_path / "loha.safetensors")
    convert(tmp_path / "loha.safetensors", tmp_path / "out.safetensors", "kohya")
    back = load_adapter(tmp_path / "out.safetensors")
    assert exactly(back) == exactly(load_adapter(tmp_path / "loha.safetensors"))
    w1, w2 = (held[f"lora_unet_fc.hada_w{i}_a"] @ held[f"lora_unet_fc.hada_w{i}_b"] for i in (1, 2))
    assert exactly(back)["lora_unet_fc"] == [[Fraction(x) for x in row] for row in (0.5 * w1 * w2).tolist()]
    save_file(
        {**{name: torch.randn_like(tensor) for name, tensor in held.items()}, "lora_unet_fc.alpha": torch.tensor(1.0)},
        tmp_path / "fine.safetensors",
    )
    with pytest.raises(UnsupportedAdapterError, match="need float64"):
        convert(tmp_path / "fine.safetensors", tmp_path / "no.safetensors", "kohya")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_and_weights_of_adapted_modules(tmp_path: Path, bias: str) -> None:
    """PEFT's own names for them: the wrapped layer's."""
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 8), f"base_model.model.{name}.lora_B.weight": torch.randn(8, 2),
        f"base_model.model.{name}.base_layer.bias": torch.randn(8),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 11),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(8, 2),
        "base_model.model.model.embed_tokens.base_layer.weight": torch.randn(11, 8),
    }  # fmt: skip
    if bias == "all":
        tensors["base_model.model.model.layers.0.mlp.up_proj.bias"] = torch.randn(6)
    first = saved(tmp_path / "first", tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": bias})
    convert(first, tmp_path / "second", "peft")
    again = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[each], tensors[each]) for each in tensors)
    fields = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (fields["bias"], fields["modules_to_save"]) == (bias, None)
    load_adapter(tmp_path / "second")

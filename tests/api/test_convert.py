"""What others make of the files that are written, names that need the base, and refusals that write nothing."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import formats
import lorafold
from lorafold.adapters.load import load_adapter
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AmbiguousNameError, InputError, LorafoldError, OutputError, OutputExistsError, UnsupportedAdapterError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return formats.base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return formats.peft(tmp_path / "adapter", formats.pairs())


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    lorafold.merge(base, [adapter], out, read_options=ReadOptions(allow_pickle=True, **options))
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("target", ["mlx", "gguf", "loralib"])
def test_converted_adapters_merge_to_the_same_weights(tmp_path: Path, base: Path, adapter: Path, target: str) -> None:
    out = tmp_path / {"mlx": "new", "gguf": "new.gguf", "loralib": "new.pt"}[target]
    done = lorafold.convert(adapter, out, target, base=base)
    assert (done.source, done.target, done.modules) == ("peft", target, 15)
    wanted = merged(base, adapter, tmp_path / "one")
    found = merged(base, out, tmp_path / "two", lora_alpha=formats.ALPHA if target == "loralib" else None)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gguf_is_what_the_gguf_package_writes(tmp_path: Path, base: Path, adapter: Path) -> None:
    import gguf

    torch.manual_seed(1)
    reference = gguf.GGUFReader(formats.gguf(tmp_path / "reference", formats.pairs()))
    lorafold.convert(adapter, tmp_path / "new.gguf", "gguf", base=base)
    reader = gguf.GGUFReader(tmp_path / "new.gguf")
    ours, theirs = ({t.name: t for t in each.tensors} for each in (reader, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type
        assert list(tensor.shape) == list(theirs[name].shape)
        assert (tensor.data == theirs[name].data).all()
    for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"):
        assert reader.fields[key].contents() == reference.fields[key].contents()


@pytest.mark.slow  # imports transformers and PEFT
def test_peft_takes_what_is_written_for_it(tmp_path: Path) -> None:
    import peft
    import transformers

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=formats.VOCAB, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    first = formats.mlx(tmp_path / "mlx", formats.pairs())
    lorafold.convert(first, tmp_path / "new", "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "new")
    found = wrapped.merge_and_unload().state_dict()
    wanted = merged(tmp_path / "base", first, tmp_path / "out")
    # PEFT adds in float32, in another order: two roundings of sums of 2 products beside one weight, so 4 ulp of the largest
    for name, weight in wanted.items():
        assert torch.allclose(found[name], weight, rtol=4 * 2**-23, atol=4 * 2**-23 * float(weight.abs().max())), name


UNET = {
    "conv_in.weight": (4, 3, 3, 3), "down_blocks.0.attentions.0.to_q.weight": (6, 4),
    "down_blocks.0.attentions.0.to_out.0.weight": (4, 6),
}  # fmt: skip


def unet(folder: Path) -> tuple[Path, Path]:
    """A UNet of three weights, and a kohya file for it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file({name: formats.numbers(*shape) for name, shape in UNET.items()}, folder / "diffusion_pytorch_model.safetensors")
    tensors = {}
    for name, (out, inner, *kernel) in UNET.items():
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{module}.lora_down.weight"] = formats.numbers(2, inner, *kernel)
        tensors[f"{module}.lora_up.weight"] = formats.numbers(out, 2, *(1 for _ in kernel))
        tensors[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(tensors, folder.parent / "kohya.safetensors")
    return folder, folder.parent / "kohya.safetensors"


def test_underscores_are_resolved_by_the_base(tmp_path: Path) -> None:
    base, kohya = unet(tmp_path / "unet")
    for target, out in (("diffusers", tmp_path / "d.safetensors"), ("peft", tmp_path / "peft")):
        with pytest.raises(InputError, match="spelled with underscores"):
            lorafold.convert(kohya, out, target)
        assert not out.exists()
        lorafold.convert(kohya, out, target, base=base)
    names = set(load_adapter(tmp_path / "peft").modules)
    assert names == {name.removesuffix(".weight") for name in UNET}
    assert set(load_adapter(tmp_path / "d.safetensors").modules) == {f"unet.{name}" for name in names}
    lorafold.convert(
        tmp_path / "peft", tmp_path / "again.safetensors", "kohya", base=base, read_options=ReadOptions(component="unet")
    )
    one, two = load_file(kohya), load_file(tmp_path / "again.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_kernels_of_one_on_linear_layers_are_taken_off(tmp_path: Path) -> None:
    base, kohya = unet(tmp_path / "unet")
    held = load_file(kohya)
    held = {name: t[:, :, None, None] if "to_q.lora_" in name else t for name, t in held.items()}
    save_file(held, kohya)
    lorafold.convert(kohya, tmp_path / "peft", "peft", base=base)
    shapes = {name: module.shape for name, module in load_adapter(tmp_path / "peft").modules.items()}
    assert shapes == {name.removesuffix(".weight"): shape for name, shape in UNET.items()}


@pytest.mark.parametrize("around", ["block_sparse_moe", "mlp"])
def test_experts_of_mlx(tmp_path: Path, around: str) -> None:
    names = ("w1", "w2") if around == "block_sparse_moe" else ("gate_proj", "down_proj")
    where = f"model.layers.0.{around}.experts"
    held = {f"{where}.{e}.{name}": (formats.numbers(2, 4), formats.numbers(6, 2)) for e in range(3) for name in names}
    first = formats.peft(tmp_path / "first", held)
    lorafold.convert(first, tmp_path / "mlx", "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    where = f"model.layers.0.{around}.switch_mlp"
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"{where}.{last}.{part}": shape
        for last in ("gate_proj", "down_proj")
        for part, shape in (("lora_a", (3, 2, 4)), ("lora_b", (3, 6, 2)))
    }
    lorafold.convert(tmp_path / "mlx", tmp_path / "back", "peft")
    one, two = (load_file(each / "adapter_model.safetensors") for each in (first, tmp_path / "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    del held[f"model.layers.0.{around}.experts.1.{names[0]}"]
    with pytest.raises(UnsupportedAdapterError, match="has 2 of them, up to number 2"):
        lorafold.convert(formats.peft(tmp_path / "less", held), tmp_path / "no", "mlx")


@pytest.mark.parametrize("part", ["w_norm", "diff_b"])
def test_norms_and_biases_of_lycoris_are_refused(tmp_path: Path, part: str) -> None:
    (tmp_path / "base").mkdir()
    held = {"fc.weight": torch.ones(4, 4), "fc.bias": torch.ones(4), "norm.weight": torch.ones(4), "norm.bias": torch.ones(4)}
    save_file(held, tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    tensors = {"lora_unet_norm.w_norm": torch.ones(4)} if part == "w_norm" else {
        "lora_unet_fc.diff": torch.ones(4, 4), "lora_unet_fc.diff_b": torch.ones(4)
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    for target, out in (("peft", "out"), ("diffusers", "out.safetensors"), ("kohya", "out.safetensors")):
        with pytest.raises(UnsupportedAdapterError, match=f"{part}' changes a norm or a bias|not for the weight of a module"):
            lorafold.convert(tmp_path / "a.safetensors", tmp_path / out, target, base=tmp_path / "base")
        assert not (tmp_path / out).exists()


def test_names_are_respelled(tmp_path: Path, adapter: Path) -> None:
    options = ReadOptions(renames=(("model.layers", "encoder.block"),))
    lorafold.convert(adapter, tmp_path / "out", "peft", read_options=options)
    assert "encoder.block.0.self_attn.q_proj" in load_adapter(tmp_path / "out").modules


def test_names_that_would_be_one_are_refused(tmp_path: Path) -> None:
    held = {name: (formats.numbers(2, 4), formats.numbers(4, 2)) for name in ("a.b_c", "a_b.c")}
    adapter = formats.peft(tmp_path / "adapter", held)
    with pytest.raises(AmbiguousNameError, match=r"a\.b_c and a_b\.c would both be lora_unet_a_b_c"):
        lorafold.convert(adapter, tmp_path / "out.safetensors", "kohya", read_options=ReadOptions(component="unet"))
    one = formats.peft(tmp_path / "one", {"a.b_c": held["a.b_c"]})
    (tmp_path / "base").mkdir()
    save_file({f"{name}.weight": formats.numbers(4, 4) for name in held}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(AmbiguousNameError, match="another module of the base"):
        lorafold.convert(
            one, tmp_path / "out.safetensors", "kohya", read_options=ReadOptions(component="unet"), base=tmp_path / "base"
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_asked_for(tmp_path: Path, base: Path, adapter: Path) -> None:
    def refused(kind: type[LorafoldError], words: str, target: str, out: str = "", **options: Any) -> None:
        path = tmp_path / (out or {"gguf": "out.gguf", "peft": "out", "mlx": "out"}.get(target, "out.safetensors"))
        with pytest.raises(kind, match=words):
            lorafold.convert(adapter, path, target, **options)
        assert not path.exists()

    refused(OutputError, r"ends in \.gguf", "gguf", "out.bin", base=base)

    refused(InputError, "hint: give the base", "gguf")
    refused(InputError, r"ReadOptions\(component='unet'\)", "kohya")
    refused(InputError, r"ReadOptions\(component='unet'\)", "diffusers")
    refused(InputError, "did you mean gguf", "ggfu")
    refused(InputError, "no part 'transformer', or other names in it", "kohya", read_options=ReadOptions(component="transformer"))
    odd = formats.base(tmp_path / "odd", "falcon")
    refused(UnsupportedAdapterError, "model_type 'falcon'", "gguf", base=odd)
    tune = formats.torchtune(tmp_path / "tune", formats.pairs())
    with pytest.raises(InputError, match="hint: give the base"):
        lorafold.convert(tune, tmp_path / "out", "peft", read_options=ReadOptions(allow_pickle=True))
    lorafold.convert(tune, tmp_path / "out", "peft", base=base, read_options=ReadOptions(allow_pickle=True))
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        lorafold.convert(adapter, tmp_path / "out", "mlx")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(OutputExistsError):
        lorafold.convert(adapter, tmp_path / "a.gguf", "gguf", base=base)
    (tmp_path / "a.gguf").rmdir()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    lorafold.convert(adapter, tmp_path / "out", "mlx", overwrite=True)
    assert load_adapter(tmp_path / "out").format == "mlx"
    lorafold.convert(adapter, tmp_path / "a.pt", "loralib")
    with pytest.raises(OutputExistsError):
        lorafold.convert(adapter, tmp_path / "a.pt", "loralib")
    lorafold.convert(adapter, tmp_path / "a.gguf", "gguf", base=base)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_rounding_is_asked_for(tmp_path: Path, adapter: Path) -> None:
    fields = json.loads((adapter / "adapter_config.json").read_text()) | {"alpha_pattern": {"lm_head": 0.7}}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    held = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.lm_head.lora_B.weight"
    save_file(held | {name: torch.randn(formats.VOCAB, formats.R)}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match=r"those of 1 would go into lora_B, and round it.*lm_head"):
        lorafold.convert(adapter, tmp_path / "out", "mlx")
    done = lorafold.convert(adapter, tmp_path / "out", "mlx", allow_rounding=True)
    assert "the factors of 1 modules went into their lora_B, rounded to float32 in 1" in done.notes


@pytest.mark.parametrize("target", ["peft", "mlx", "gguf", "loralib"])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_system_that_refuses_leaves_nothing(
    tmp_path: Path, base: Path, adapter: Path, target: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / {"gguf": "out.gguf", "loralib": "out.pt"}.get(target, "out")
    before = sorted(path.name for path in tmp_path.iterdir())

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OutputError):
        lorafold.convert(adapter, out, target, base=base)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_every_layer_of_loralib_has_a_place_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = {
        "fc.weight": formats.numbers(5, 7), "emb.weight": formats.numbers(11, 6), "qkv.weight": formats.numbers(9, 7),
        "conv.weight": formats.numbers(3, 4, 3, 3), "c_fc.weight": formats.numbers(7, 5),
    }  # fmt: skip
    lora = {
        "fc.lora_A": formats.numbers(2, 7), "fc.lora_B": formats.numbers(5, 2), "emb.lora_A": formats.numbers(2, 11),
        "emb.lora_B": formats.numbers(6, 2), "qkv.lora_A": formats.numbers(4, 7), "qkv.lora_B": formats.numbers(6, 2),
        "conv.lora_A": formats.numbers(6, 12), "conv.lora_B": formats.numbers(9, 6),
        "c_fc.lora_A": formats.numbers(2, 7), "c_fc.lora_B": formats.numbers(5, 2),
    }  # fmt: skip
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    torch.save(lora, tmp_path / "lora.pt")
    options = ReadOptions(lora_alpha=6, allow_pickle=True, enable_lora=(True, False, True))
    lorafold.convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", base=tmp_path / "base", read_options=options)
    modules = load_adapter(tmp_path / "peft").modules
    assert [name for name, module in modules.items() if module.embedding] == ["emb"]
    lorafold.merge(tmp_path / "base", [tmp_path / "lora.pt"], tmp_path / "one", read_options=options)
    lorafold.merge(tmp_path / "base", [tmp_path / "peft"], tmp_path / "two")
    one, two = (load_file(tmp_path / each / "model.safetensors") for each in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], base[name]) for name in base)

"""Adapters of image models in the other side's names: the same ΔW, which diffusers' converter of checkpoints takes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import formats
import lorafold
from diffusion import as_diffusers, as_kohya, write
from lorafold import ReadOptions
from lorafold.errors import UnsupportedAdapterError
from makers import CASES, converted, makers_of, open_clip

Named = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]


def whole_pairs(tensors: Named, only: str = "") -> Factors:
    """Factors of whole numbers for every matrix and kernel, so that all products are exact."""
    torch.manual_seed(5)
    return {
        name.removesuffix(".weight"): (
            torch.randint(-3, 4, (2, *tensor.shape[1:])).float(),
            torch.randint(-3, 4, (tensor.shape[0], 2, *(1,) * (tensor.dim() - 2))).float(),
        )
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() > 1 and name.startswith(only)
    }


def product(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    return (scaling * B.double().flatten(1) @ A.double().flatten(1)).view(B.shape[0], *A.shape[1:])


def deltas(path: Path) -> Named:
    """ΔW by module of a file of kohya's or diffusers'."""
    held = load_file(path)
    found: Named = {}
    for name in held:
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            A, B = held[name], held[f"{module}.lora_up.weight"]
            found[module] = product(A, B, held[f"{module}.alpha"].double().item() / A.shape[0])
        elif name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            found[module] = product(held[name], held[f"{module}.lora_B.weight"])
    return found


def bases(tmp_path: Path, held: Named, makers: Named) -> tuple[Path, Path]:
    """The same model in a file in diffusers' names, and in one in its makers'."""
    for path, tensors in (("d", held), ("m", {f"model.diffusion_model.{name}": tensor for name, tensor in makers.items()})):
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / f"{path}.safetensors")
    return tmp_path / "d.safetensors", tmp_path / "m.safetensors"


@pytest.fixture(scope="module", params=[name for name in CASES if name != "SDXL"])
def family(request) -> tuple[str, Named, Named]:
    held = {name: tensor.clone() for name, tensor in CASES[request.param].make().state_dict().items()}
    return request.param, held, makers_of(request.param, held)


def test_diffusers_names_to_kohyas_and_back(tmp_path, family):
    """All linear layers and convolutions, whatever names the base has."""
    name, held, makers = family
    folder = "unet" if name == "SD 1.5" else "transformer"
    factors = whole_pairs(held)
    adapter = write(tmp_path / "one.safetensors", as_diffusers({folder: factors}))
    wanted = {module: product(*pair) for module, pair in factors.items()}
    files = {}
    for base in bases(tmp_path, held, makers):
        kohya, again = tmp_path / f"k-{base.name}", tmp_path / f"a-{base.name}"
        lorafold.convert(adapter, kohya, "kohya", base=base)
        lorafold.convert(kohya, again, "diffusers", base=base)
        files[base.stem] = kohya.read_bytes(), again.read_bytes()
        back = deltas(again)
        assert {module.removeprefix(f"{folder}.") for module in back} == wanted.keys()
        assert all(torch.equal(back[f"{folder}.{module}"], delta) for module, delta in wanted.items())
        third = tmp_path / "third.safetensors"
        lorafold.convert(again, third, "kohya", base=base, overwrite=True)
        assert load_file(third).keys() == load_file(kohya).keys()
        assert all(torch.equal(tensor, load_file(third)[key]) for key, tensor in load_file(kohya).items())
    assert files["d"] == files["m"]
    found = deltas(tmp_path / "k-d.safetensors")
    theirs = held if name == "SD 1.5" else makers
    spelled = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_"): key for key in theirs}
    full = dict(theirs) | {spelled[module]: delta for module, delta in found.items()}
    if name != "SD 1.5":
        full = converted(CASES[name], full, dict(CASES[name].make().config))
    assert all(torch.equal(full[f"{module}.weight"].double(), delta) for module, delta in wanted.items())


def test_makers_names_to_diffusers(tmp_path, family):
    """What fused weights learned is divided by rows, with the same lora_A."""
    name, held, makers = family
    if name == "SD 1.5":
        makers = {key: tensor for key, tensor in makers.items() if key.startswith("input_blocks")}
    factors = whole_pairs(makers)
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_unet": factors}, alpha=4.0))
    full = dict(makers_of(name, held)) | {f"{module}.weight": product(*pair, 2.0) for module, pair in factors.items()}
    wanted = converted(CASES[name], full, dict(CASES[name].make().config))
    for base in bases(tmp_path, held, makers_of(name, held)):
        lorafold.convert(adapter, tmp_path / "out.safetensors", "diffusers", base=base, overwrite=True)
        found = deltas(tmp_path / "out.safetensors")
        assert found
        folder = "unet" if name == "SD 1.5" else "transformer"
        scale = _factors(tmp_path / "out.safetensors")
        for module, delta in found.items():
            assert torch.equal(delta * scale, wanted[module.removeprefix(f"{folder}.") + ".weight"].double()), module
        rank = {tensor.shape[0] for key, tensor in load_file(tmp_path / "out.safetensors").items() if "lora_A" in key}
        assert rank == {2}


def _factors(path: Path) -> float:
    """lora_alpha over r, as diffusers reads it."""
    import json

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["lora_adapter_metadata"])
    alpha, rank = ({value for key, value in fields.items() if key.endswith(end)} for end in (".lora_alpha", ".r"))
    return alpha.pop() / rank.pop()


def test_sdxl_has_its_makers_names(tmp_path):
    held = {name: tensor.clone() for name, tensor in CASES["SDXL"].make().state_dict().items()}
    factors = whole_pairs(held, "down_blocks.1.attentions.0.transformer_blocks.0")
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"unet": factors}))
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "base.safetensors")
    lorafold.convert(adapter, tmp_path / "k.safetensors", "kohya", base=tmp_path / "base.safetensors")
    found = deltas(tmp_path / "k.safetensors")
    assert len(found) == len(factors)
    assert all(name.startswith("lora_unet_input_blocks_") for name in found)


def test_a_part_of_a_fused_weight(tmp_path):
    """Where queries alone learned something, lora_B has zeros for keys and values."""
    held = {name: tensor.clone() for name, tensor in CASES["FLUX.1"].make().state_dict().items()}
    base, _ = bases(tmp_path, held, makers_of("FLUX.1", held))
    factors = whole_pairs(held, "transformer_blocks.0.attn.to_q")
    adapter = write(tmp_path / "one.safetensors", as_diffusers({"transformer": factors}))
    lorafold.convert(adapter, tmp_path / "k.safetensors", "kohya", base=base)
    ((name, delta),) = deltas(tmp_path / "k.safetensors").items()
    assert name == "lora_unet_double_blocks_0_img_attn_qkv"
    third = delta.shape[0] // 3
    assert torch.equal(delta[:third], product(*factors["transformer_blocks.0.attn.to_q"]))
    assert not delta[third:].any()


def test_dora_of_a_part_of_a_fused_weight_is_refused(tmp_path):
    held = {name: tensor.clone() for name, tensor in CASES["FLUX.1"].make().state_dict().items()}
    base, _ = bases(tmp_path, held, makers_of("FLUX.1", held))
    name = "transformer_blocks.0.attn.to_q"
    A, B = whole_pairs(held, name)[name]
    tensors = {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
    tensors[f"transformer.{name}.lora_magnitude_vector"] = torch.ones(B.shape[0])
    adapter = write(tmp_path / "one.safetensors", tensors)
    with pytest.raises(UnsupportedAdapterError, match="DoRA of a part"):
        lorafold.convert(adapter, tmp_path / "k.safetensors", "kohya", base=base)
    assert not (tmp_path / "k.safetensors").exists()


def test_a_peft_folder_of_a_transformer(tmp_path):
    """Its names say no part; the user does."""
    held = {name: tensor.clone() for name, tensor in CASES["FLUX.1"].make().state_dict().items()}
    base, makers = bases(tmp_path, held, makers_of("FLUX.1", held))
    factors = whole_pairs(held)
    adapter = formats.peft(tmp_path / "peft", factors)
    for path in (base, makers):
        read = ReadOptions(component="transformer")
        lorafold.convert(adapter, tmp_path / f"k-{path.name}", "kohya", base=path, read_options=read)
    one, two = (load_file(tmp_path / f"k-{path.name}") for path in (base, makers))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(key.startswith("lora_unet_single_blocks_0_linear1") for key in one)


def test_text_encoders_have_transformers_names(tmp_path):
    """Kohya's files have them of an OpenCLIP encoder too."""
    held, stored = open_clip()
    save_file({f"conditioner.embedders.1.model.{name}": t for name, t in stored.items()}, tmp_path / "base.safetensors")
    body = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in held.items() if ".layers." in name}
    factors = whole_pairs(body)
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_te2": factors}, alpha=2.0))
    lorafold.convert(adapter, tmp_path / "d.safetensors", "diffusers", base=tmp_path / "base.safetensors")
    found = deltas(tmp_path / "d.safetensors")
    assert found.keys() == {f"text_encoder_2.{name}" for name in factors}
    assert all(torch.equal(found[f"text_encoder_2.{name}"], product(*pair)) for name, pair in factors.items())
    lorafold.convert(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya", base=tmp_path / "base.safetensors")
    assert deltas(tmp_path / "k.safetensors").keys() == {
        f"lora_te2_{name}".replace(".", "_").replace("lora_te2_", "lora_te2_", 1) for name in factors
    }

"""OFT, BOFT, GLoRA and IA³: against the layers of LyCORIS that train them, and to the bit against their formulas in numpy."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold.errors import AdapterError, PlanError, ShapeMismatchError, UnsupportedAdapterError
from lorafold.kernel.rotations import cayley
from models import refused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of an optional compiler that is not there
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module

LAYERS = {
    "linear": lambda: nn.Linear(12, 32),
    "conv3": lambda: nn.Conv2d(6, 32, 3, padding=1),
    "conv1": lambda: nn.Conv2d(6, 32, 1),
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "oft": (DiagOFTModule, {"lora_dim": 4}),
    "oft limited": (DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "oft limited in vain": (DiagOFTModule, {"lora_dim": 4, "constraint": 10.0}),
    "oft rescaled": (DiagOFTModule, {"lora_dim": 4, "rescaled": True}),
    "boft": (ButterflyOFTModule, {"lora_dim": 4}),
    "boft limited and rescaled": (ButterflyOFTModule, {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
    "glora": (GLoRAModule, {"lora_dim": 2, "alpha": 0.75}),
    "ia3": (IA3Module, {}),
    "ia3 of inputs": (IA3Module, {"train_on_input": True}),
}
PAIRS = [(kind, case) for kind in LAYERS for case in CASES if kind != "conv3" or case != "glora"]


def trained(kind: str, case: str, multiplier: float = 1.0) -> tuple[nn.Module, Any]:
    """A layer, and LyCORIS's module on it with random numbers."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    make, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make("lycoris_block_layer", layer, multiplier, **options)
    module.apply_to()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "org" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if name == "rescale" else 0.0))
    return layer, module.eval()


def saved(path: Path, layer: nn.Module, module: Any, name: str = "lycoris_block_layer") -> tuple[Path, Path]:
    """The files of the layer, `block.layer` of a base, and of the module as LyCORIS names its tensors."""
    tensors = {n: t.detach().clone().contiguous() for n, t in module.state_dict().items() if "org" not in n}
    save_file({f"{name}.{n}": t for n, t in tensors.items()}, path / "adapter.safetensors")
    held = {"block.layer.weight": layer.weight.detach().clone(), "block.layer.bias": layer.bias.detach().clone()}
    save_file(held, path / "base.safetensors")
    return path / "base.safetensors", path / "adapter.safetensors"


def merged(base: Path, adapter: Path, out: Path, weight: float = 1.0, **options: Any) -> dict[str, Tensor]:
    lorafold.merge(base, [(adapter, weight)], out, overwrite=True, **options)
    (file,) = out.glob("*.safetensors")
    return load_file(file)


def effective(layer: nn.Module, module: Any) -> Tensor:
    """The weight that the adapted layer computes with: what it makes of each input alone."""
    original = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        zero = module(torch.zeros(1, layer.in_features))
        return (module(torch.eye(layer.in_features)) - zero).T.detach()
    inner, size = original.shape[1], original.shape[2:]
    pictures = torch.eye(inner * size.numel()).view(-1, inner, *size)
    layer.padding, module.kw_dict["padding"] = (0, 0), (0, 0)
    zero = module(torch.zeros(1, inner, *size))
    return (module(pictures) - zero).flatten(1).T.reshape(original.shape).detach()


@pytest.mark.parametrize(("kind", "case"), PAIRS)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_merged_layer_computes_what_lycoris_computes(tmp_path, kind, case, weight):
    """LyCORIS computes in float32: 2⁻²⁴ for each of some dozens of sums of numbers near 1, of which 1e-5 leaves none out."""
    layer, module = trained(kind, case, weight)
    base, adapter = saved(tmp_path, layer, module)
    found = merged(base, adapter, tmp_path / "out", weight)
    wanted = effective(layer, module)
    assert torch.equal(found["block.layer.bias"], layer.bias)
    assert not torch.allclose(found["block.layer.weight"], layer.weight, atol=1e-3)
    assert torch.allclose(found["block.layer.weight"], wanted, rtol=1e-6, atol=1e-5), (
        (found["block.layer.weight"] - wanted).abs().max()
    )
    lorafold.verify(tmp_path / "out", base, [(adapter, weight)]).raise_for_failures()


def formula(weight: np.ndarray, parts: dict[str, np.ndarray], case: str, m: float) -> np.ndarray:
    """The closed form in float64, by numpy's own products and inverse; `weight` (out, rest)."""
    if case.startswith(("oft", "boft")):
        blocks, out = parts["oft_blocks"], weight.shape[0]
        Q = blocks - blocks.swapaxes(-1, -2)
        norm, limit = np.sqrt((Q * Q).sum()) + 1e-8, float(parts["alpha"]) * out
        Q = Q * limit / norm if limit > 0 and norm > limit else Q
        eye = np.eye(Q.shape[-1])
        R = m * ((eye + Q) @ np.linalg.inv(eye - Q)) + (1 - m) * eye
        if case.startswith("oft"):
            k, s, _ = R.shape
            found = np.einsum("knm,knr->kmr", R, weight.reshape(k, s, -1)).reshape(weight.shape)
        else:
            found, s = weight, R.shape[-1]
            for i in range(R.shape[0]):
                stride = 2**i * s // 2
                grouped = found.reshape(-1, 2, stride, weight.shape[1]).swapaxes(1, 2).reshape(-1, s, weight.shape[1])
                turned = np.einsum("bij,bjr->bir", R[i], grouped)
                found = turned.reshape(-1, stride, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        return found * parts["rescale"].reshape(-1, 1) if "rescale" in parts else found
    if case == "glora":
        a1, a2, b1, b2 = (parts[f"{name}.weight"].reshape(parts[f"{name}.weight"].shape[:2]) for name in ("a1", "a2", "b1", "b2"))
        return weight + m * float(parts["alpha"]) / a2.shape[0] * (weight @ a1 @ a2 + b1 @ b2)
    w = parts["weight"].reshape(-1)
    return weight * (1 + m * (np.repeat(w, weight.shape[1] // w.size)[None, :] if int(parts["on_input"]) else w[:, None]))


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_the_result_is_the_formula_rounded_once(tmp_path, kind, case):
    """numpy adds in another order, which is some 2⁻⁵³ of numbers below 30; what comes out is rounded to the type at once."""
    layer, module = trained(kind, case)
    base, adapter = saved(tmp_path, layer, module)
    flat = layer.weight.detach().double().flatten(1).numpy()
    parts = {name.removeprefix("lycoris_block_layer."): t.double().numpy() for name, t in load_file(adapter).items()}
    for m in (1.0, 0.5):
        wanted = torch.from_numpy(formula(flat, parts, case, m)).view(layer.weight.shape)
        wide = merged(base, adapter, tmp_path / "wide", m, dtype="F64")["block.layer.weight"]
        assert (wide - wanted).abs().max() < 2.0**-44
        near = merged(base, adapter, tmp_path / "near", m)["block.layer.weight"]
        assert torch.equal(near, wide.float())
        half = merged(base, adapter, tmp_path / "half", m, dtype="BF16")["block.layer.weight"]
        assert torch.equal(half, wide.bfloat16())


def test_the_prefix_of_sd_scripts(tmp_path):
    layer, module = trained("linear", "oft limited")
    base, adapter = saved(tmp_path, layer, module)
    wanted = merged(base, adapter, tmp_path / "one")
    base, adapter = saved(tmp_path, layer, module, "oft_unet_block_layer")
    assert torch.equal(merged(base, adapter, tmp_path / "two")["block.layer.weight"], wanted["block.layer.weight"])


def test_a_rotation_is_one():
    """R Rᵀ = I, whatever the blocks are.

    No singular value of I − Q is below 1, so its condition is at most 1 + ‖Q‖, and elimination without exchanges, whose pivots are
    not below 1 either, loses some s² · 2⁻⁵³ times that.
    """
    torch.manual_seed(2)
    for scale in (0.01, 1.0, 100.0):
        blocks = torch.randn(3, 8, 8, dtype=torch.float64) * scale
        R, norm = cayley(blocks), float((blocks - blocks.transpose(-1, -2)).norm())
        assert (R @ R.transpose(-1, -2) - torch.eye(8)).abs().max() < 8**2 * (1 + norm) * 2.0**-53
        assert (torch.linalg.det(R) - 1).abs().max() < 8**2 * (1 + norm) * 2.0**-53


def test_undone_bit_for_bit(tmp_path):
    for case in ("oft", "glora"):
        layer, module = trained("linear", case)
        base, adapter = saved(tmp_path, layer, module)
        lorafold.merge(base, [adapter], tmp_path / case, undo=tmp_path / f"{case}.undo")
        lorafold.unmerge(tmp_path / case, tmp_path / f"{case} back", undo=tmp_path / f"{case}.undo")
        (file,) = (tmp_path / f"{case} back").glob("*.safetensors")
        assert all(torch.equal(load_file(file)[name], tensor) for name, tensor in load_file(base).items())


def test_beside_another_change_of_the_same_weight(tmp_path):
    layer, module = trained("linear", "oft")
    base, adapter = saved(tmp_path, layer, module)
    pair = {"lora_unet_block_layer.lora_down.weight": torch.ones(2, 12), "lora_unet_block_layer.lora_up.weight": torch.ones(32, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    for adapters in ([adapter, tmp_path / "lora.safetensors"], [tmp_path / "lora.safetensors", adapter]):
        refused(base, adapters, PlanError, "changed twice", "OFT is no sum", "merge the first")


@pytest.mark.parametrize("case", ["oft", "glora", "ia3"])
def test_what_is_no_sum_is_not_written_as_one(tmp_path, case):
    layer, module = trained("linear", case)
    _, adapter = saved(tmp_path, layer, module, "lora_unet_block_layer")
    for to, name in (("kohya", "two.safetensors"), ("peft", "two")):
        with pytest.raises(UnsupportedAdapterError, match="which is no sum"):
            lorafold.convert(adapter, tmp_path / name, to)
        assert not (tmp_path / name).exists()


def test_into_a_model_in_memory(tmp_path):
    """The bits of merged files, and the model's own again after."""
    layer, module = trained("linear", "boft limited and rescaled")
    base, adapter = saved(tmp_path, layer, module)
    wanted = merged(base, adapter, tmp_path / "out")["block.layer.weight"]
    model = nn.ModuleDict({"block": nn.ModuleDict({"layer": nn.Linear(12, 32)})})
    model.load_state_dict(load_file(base))
    with lorafold.merge_into(model, [adapter]):
        assert torch.equal(model["block"]["layer"].weight, wanted)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in load_file(base).items())


def test_of_a_fused_weight(tmp_path):
    """What turns rows among each other is not split, and says so."""
    from makers import CASES as FAMILIES
    from makers import makers_of

    held = dict(FAMILIES["FLUX.1"].make().state_dict())
    save_file(makers_of("FLUX.1", held), tmp_path / "base.safetensors")
    name = "lora_unet_transformer_blocks_0_attn_to_q"
    save_file({f"{name}.oft_blocks": torch.rand(4, 4, 4), f"{name}.alpha": torch.tensor(0.0)}, tmp_path / "oft.safetensors")
    refused(tmp_path / "base.safetensors", [tmp_path / "oft.safetensors"], UnsupportedAdapterError, "OFT", "fused")


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"oft_blocks": torch.zeros(4, 4, 4)}, ShapeMismatchError, "16 outputs"),
        ({"oft_blocks": torch.zeros(8, 4, 3)}, AdapterError, "(blocks, size, size)"),
        ({"oft_blocks": torch.zeros(8, 4, 4), "alpha": torch.tensor(-1.0)}, AdapterError, "0 or more"),
        ({"oft_blocks": torch.zeros(8, 4, 4), "rescale": torch.ones(3, 1)}, ShapeMismatchError, "outputs"),
        ({"oft_blocks.0": torch.zeros(8, 4, 4)}, UnsupportedAdapterError, "parts of a fused weight"),
        ({"rescale": torch.ones(32, 1)}, AdapterError, "oft_blocks"),
        ({"weight": torch.ones(32), "on_input": torch.tensor(1)}, ShapeMismatchError, "32 inputs"),
        ({"weight": torch.ones(32), "on_input": torch.tensor(2)}, AdapterError, "expected 0 or 1"),
        ({"on_input": torch.tensor(1)}, AdapterError, "no ia3"),
        ({"a1.weight": torch.ones(12, 2), "a2.weight": torch.ones(2, 12), "b1.weight": torch.ones(32, 2)}, AdapterError, "no b2"),
    ],
)
def test_refused(tmp_path, parts, error, words):
    layer, _ = trained("linear", "oft")
    save_file({"block.layer.weight": layer.weight.detach().clone()}, tmp_path / "base.safetensors")
    save_file({f"lycoris_block_layer.{name}": tensor for name, tensor in parts.items()}, tmp_path / "one.safetensors")
    refused(tmp_path / "base.safetensors", [tmp_path / "one.safetensors"], error, words)

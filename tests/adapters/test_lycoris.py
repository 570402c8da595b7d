"""Files that LyCORIS writes, merged, against what its layers compute: their forward, as their merge has the factor twice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold.errors import AdapterError, UnsupportedAdapterError
from models import refused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of an optional compiler that is not there
    from lycoris.modules.full import FullModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule
    from lycoris.modules.norms import NormModule

LAYERS = {
    "linear": lambda: nn.Linear(12, 8),
    "conv3": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "conv1": lambda: nn.Conv2d(6, 8, 1),
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
}
CASES = {
    "locon": (LoConModule, {}),
    "locon rs": (LoConModule, {"rs_lora": True}),
    "locon scalar": (LoConModule, {"use_scalar": True}),
    "locon tucker": (LoConModule, {"use_tucker": True}),
    "locon dora": (LoConModule, {"weight_decompose": True}),
    "locon dora of inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha of full rank": (LohaModule, {"lora_dim": 4}),
    "loha scalar": (LohaModule, {"use_scalar": True}),
    "loha tucker": (LohaModule, {"use_tucker": True}),
    "loha tucker of full rank": (LohaModule, {"use_tucker": True, "lora_dim": 4}),
    "loha dora": (LohaModule, {"weight_decompose": True}),
    "loha dora of inputs": (LohaModule, {"weight_decompose": True, "wd_on_out": False}),
    "lokr": (LokrModule, {"lora_dim": 1, "factor": 2}),
    "lokr both factored": (LokrModule, {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr tucker": (LokrModule, {"lora_dim": 1, "factor": 2, "use_tucker": True}),
    "lokr whole": (LokrModule, {"full_matrix": True, "factor": 2}),
    "lokr whole rs": (LokrModule, {"lora_dim": 1, "factor": 2, "rs_lora": True}),
    "lokr dora": (LokrModule, {"lora_dim": 1, "factor": 2, "weight_decompose": True}),
    "full": (FullModule, {}),
}


def layer_of(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LAYERS[kind]().double()


def changed(layer: nn.Module, case: str, *, alpha: float = 0.75, multiplier: float = 1.0) -> Any:
    """A LyCORIS module on `layer`, every number of it random, in float64."""
    kind, options = CASES[case]
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = kind("lycoris_block_layer", layer, multiplier, **{"lora_dim": 2, "alpha": alpha, **options}).double()
    if case == "full":
        module.apply_to()  # it saves what it has more than the layer that it has taken the weight of
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def saved(module: Any, path: Path, name: str = "lycoris_block_layer", **more: Tensor) -> Path:
    """What LyCORIS writes of `module`."""
    parts = dict(module.custom_state_dict() or module.state_dict())
    tensors = {f"{name}.{part}": tensor.detach().clone().contiguous() for part, tensor in parts.items()}
    save_file({**tensors, **more}, path)
    return path


def base_of(layer: nn.Module, folder: Path, name: str = "block.layer") -> Path:
    folder.mkdir()
    tensors = {f"{name}.{part}": tensor.contiguous() for part, tensor in layer.state_dict().items()}
    save_file({**tensors, "block.other.weight": torch.ones(3, 3)}, folder / "model.safetensors")
    return folder


def merged_layer(kind: str, base: Path, adapter: Path, out: Path, weight: float = 1.0) -> nn.Module:
    """The layer with its merged weights, in float64."""
    lorafold.merge(base, [(adapter, weight)], out, dtype="F64")
    tensors = load_file(out / "model.safetensors")
    layer = layer_of(kind)
    layer.load_state_dict({part: tensors[f"block.layer.{part}"] for part in layer.state_dict()})
    return layer


def input_of(kind: str) -> Tensor:
    torch.manual_seed(3)
    return torch.randn({"linear": (5, 12), "conv1d": (2, 6, 9)}.get(kind, (2, 6, 7, 7)), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_merged_layer_computes_what_lycoris_computes(tmp_path, kind, case):
    """In float64, where sums of some tens of products differ by less than 1e-13 of their size.

    LyCORIS adds the step of the type that it computes in to DoRA's norms, and here that is float64's: the norms, all above 0.5,
    then differ by 2.4e-7 at most. It stores alpha · √dim rounded to float32, which is off by 2⁻²⁴ of its size.
    """
    for weight in (1.0, 0.6):
        layer = layer_of(kind)
        base, before = base_of(layer, tmp_path / f"base{weight}"), layer(input_of(kind))
        module = changed(layer, case, multiplier=weight)
        adapter = saved(module, tmp_path / f"one{weight}.safetensors")
        found = merged_layer(kind, base, adapter, tmp_path / f"out{weight}", weight)(input_of(kind))
        wanted = module.forward(input_of(kind))
        assert not torch.allclose(wanted, before, rtol=0.01)
        tolerance = 1e-6 if "dora" in case else 2.0**-24 if "rs" in case else 1e-13
        assert float((found - wanted).detach().norm() / wanted.detach().norm()) < tolerance


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(8), lambda: nn.GroupNorm(2, 8)])
def test_norms(tmp_path, norm):
    torch.manual_seed(0)
    layer = norm().double()
    base = base_of(layer, tmp_path / "base")
    module = NormModule("lycoris_block_layer", layer, 1.0).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    adapter = saved(module, tmp_path / "one.safetensors")
    lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out", dtype="F64")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["block.layer.weight"], layer.weight + 0.5 * module.w_norm)
    assert torch.equal(found["block.layer.bias"], layer.bias + 0.5 * module.b_norm)


def test_lycoris_merges_the_factor_twice(tmp_path):
    """What this reader departs from: get_diff_weight multiplies by the factor that get_weight has in it."""
    module = changed(layer_of("linear"), "loha")
    once = module.get_weight((8, 12))
    assert torch.allclose(module.get_diff_weight(1.0, (8, 12))[0], once * module.scale)
    assert module.scale != 1.0


def test_a_whole_lokr_has_no_factor(tmp_path):
    """LyCORIS takes alpha for dim there; files of others say another one."""
    layer = layer_of("linear")
    base = base_of(layer, tmp_path / "base")
    w1, w2 = torch.randn(2, 3), torch.randn(4, 4)
    save_file(
        {"lycoris_block_layer.lokr_w1": w1, "lycoris_block_layer.lokr_w2": w2, "lycoris_block_layer.alpha": torch.tensor(1e9)},
        tmp_path / "one.safetensors",
    )
    lorafold.merge(base, [tmp_path / "one.safetensors"], tmp_path / "out", dtype="F64")
    found = load_file(tmp_path / "out" / "model.safetensors")["block.layer.weight"]
    assert torch.equal(found, layer.weight + torch.kron(w1.double(), w2.double()))


def test_the_format_is_told_and_the_factor_explained(tmp_path):
    base = base_of(layer_of("linear"), tmp_path / "base")
    adapter = saved(changed(layer_of("linear"), "loha"), tmp_path / "one.safetensors")
    plan = lorafold.plan(base, [adapter])
    (addend,) = next(step for step in plan.steps if step.action == "merge").addends
    assert plan.adapters[0].format == "lycoris"
    assert (addend.scaling, addend.why) == (0.375, "alpha 0.75 (its own) / dim 2")


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"oft_diag": (2, 4, 4), "alpha": ()}, UnsupportedAdapterError, "no longer writes"),
        ({"reshape_weight": (2,)}, UnsupportedAdapterError, "made wider"),
        ({"bm.weight": (2, 2, 3, 3)}, UnsupportedAdapterError, "GLoRA with a core tensor"),
        ({"lokr_w1": (2, 3), "lokr_t1": (1, 1), "lokr_w2": (4, 4)}, UnsupportedAdapterError, "core tensor for w1"),
        ({"hada_w1_a": (8, 2), "hada_w1_b": (2, 12), "hada_w2_a": (8, 2)}, AdapterError, "no hada_w2_b"),
        ({"hada_w1_a": (8, 2), "lokr_w1": (2, 3)}, AdapterError, "hada_w1_a, lokr_w1"),
        ({"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (2, 4)}, AdapterError, "lokr_w2_a"),
        ({"b_norm": (8,)}, AdapterError, "nothing to go with it"),
        ({"w_norm": (8,), "dora_scale": (8, 1)}, AdapterError, "do not go together"),
        ({"diff": (8, 12), "dora_sclae": (8, 1)}, AdapterError, "dora_sclae"),
        ({"diff": (8, 12), "alpha": (2,)}, AdapterError, "one number"),
    ],
)
def test_refused(tmp_path, parts, error, words):
    base = base_of(layer_of("linear"), tmp_path / "base")
    tensors = {f"lycoris_block_layer.{part}": torch.ones(shape) for part, shape in parts.items()}
    save_file(tensors, tmp_path / "one.safetensors")
    refused(base, [tmp_path / "one.safetensors"], error, words, "lycoris_block_layer", str(tmp_path / "one.safetensors"))


def test_scales_of_outputs_beside_scales_of_inputs(tmp_path):
    base = base_of(layer_of("linear"), tmp_path / "base")
    scales = {"lycoris_block_layer": torch.ones(8, 1), "lycoris_block_other": torch.ones(1, 3)}
    tensors = {f"{name}.dora_scale": scale for name, scale in scales.items()}
    for name, (out, inner) in {"lycoris_block_layer": (8, 12), "lycoris_block_other": (3, 3)}.items():
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, inner), f"{name}.lora_up.weight": torch.ones(out, 2)}
    save_file(tensors, tmp_path / "one.safetensors")
    refused(base, [tmp_path / "one.safetensors"], AdapterError, "of its outputs", "of its inputs")


@pytest.mark.parametrize(
    ("whole", "flat"),
    [
        ({"hada_w1_b": (2, 6, 3, 3), "hada_w2_b": (2, 6, 3, 3)}, {}),
        ({"lokr_w2_b": (1, 3, 3, 3)}, {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1)}),
    ],
)
def test_factors_that_have_the_kernel_in_its_own_dimensions(tmp_path, whole, flat):
    """LyCORIS's modules flatten it; its functions do not."""
    torch.manual_seed(0)
    base = base_of(layer_of("conv3"), tmp_path / "base")
    parts = flat or {"hada_w1_a": (8, 2), "hada_w2_a": (8, 2)}
    tensors = {f"lycoris_block_layer.{name}": torch.randn(shape) for name, shape in (parts | whole).items()}
    for i, held in enumerate((tensors, {name: tensor.flatten(1) for name, tensor in tensors.items()})):
        save_file(held, tmp_path / f"{i}.safetensors")
        lorafold.merge(base, [tmp_path / f"{i}.safetensors"], tmp_path / f"out{i}")
    found = [load_file(tmp_path / f"out{i}" / "model.safetensors")["block.layer.weight"] for i in (0, 1)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], layer_of("conv3").weight)

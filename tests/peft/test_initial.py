"""Adapters of which only what they were before training tells what they took out of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.errors import AdapterError, NonFiniteError, UnsupportedAdapterError
from models import edit_json, edit_tensors, refused
from oracle import correctly_rounded, same_bits

PREFIX = "base_model.model."


class Model(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.lin, self.c_fc = nn.Linear(16, 12), Conv1D(20, 16)


def trained(path: Path, dtype: torch.dtype, init: str, **config: Any) -> tuple[Path, Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter before training and after, and the weights that PEFT left of the base."""
    import peft

    torch.manual_seed(12)
    model = Model().to(dtype)
    base = path / "base"
    base.mkdir()
    save_file({name: value.clone() for name, value in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["lin", "c_fc"], "fan_in_fan_out": True, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=init, **settings))  # type: ignore[arg-type]
    left = {name: getattr(model, name).base_layer.weight.data.clone() for name in settings["target_modules"]}
    wrapped.save_pretrained(path / "initial")
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    wrapped.save_pretrained(path / "adapter")
    return base, path / "initial", path / "adapter", left


def update(adapter: Path, name: str, sign: float) -> lorafold.LowRankUpdate:
    held = load_file(adapter / "adapter_model.safetensors")
    A, B = (held[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
    one = lorafold.LowRankUpdate(A, B, sign * 1.5)
    return one.T if name == "c_fc" else one


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("init", ["pissa_niter_4", "pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_taken_out_is_what_the_adapter_was(tmp_path: Path, init: str, dtype: torch.dtype) -> None:
    config = {"target_modules": ["lin"]} if init == "olora" else {}  # which PEFT turns the wrong way for a Conv1D
    base, initial, adapter, left = trained(tmp_path, dtype, init, **config)
    options = ReadOptions(initial_adapter=str(initial))
    report = lorafold.merge(base, [adapter], tmp_path / "out", read_options=options)
    held, merged = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name in left:
        weight = held[f"{name}.weight"]
        begun = torch.from_numpy(correctly_rounded(weight, [update(initial, name, -1.0)], dtype)).to(dtype)
        assert same_bits(merged[f"{name}.weight"], correctly_rounded(begun, [update(adapter, name, 1.0)], dtype))
        # PEFT subtracts in float32 what it then rounds to the base's dtype: its factors are stored to that
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
        assert (begun.double() - left[name].double()).abs().max() <= step
    assert any("took out of the base before training is the update of initial" in note for note in report.plan.notes)
    assert report.proof is not None
    assert report.proof.share == 1.0
    assert lorafold.verify(tmp_path / "out", base, [adapter], read_options=options).failures == ()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_other_initial_adapters(tmp_path: Path) -> None:
    base, initial, adapter, _ = trained(tmp_path, torch.float32, "pissa_niter_2")
    refused(
        base, [adapter], UnsupportedAdapterError, "PiSSA by a randomised decomposition", "`ReadOptions(initial_adapter=…)` gives"
    )
    options = ReadOptions(initial_adapter=str(initial))
    first = lorafold.load_adapter(adapter, options).sha256
    edit_tensors(initial, lambda held: {name: tensor * 2 for name, tensor in held.items()})
    assert lorafold.load_adapter(adapter, options).sha256 != first
    edit_tensors(initial, lambda held: {name: tensor / 0 for name, tensor in held.items()})
    refused(base, [adapter], NonFiniteError, "initial/adapter_model.safetensors", read_options=options)
    edit_tensors(initial, lambda held: {n: t for n, t in held.items() if "lin" not in n})
    refused(base, [adapter], AdapterError, "has nothing for lin", read_options=options)
    edit_json(adapter / "adapter_config.json", init_lora_weights="loftq")
    refused(base, [adapter], UnsupportedAdapterError, "LoftQ quantised the base weight", read_options=options)
    for init in ("corda", "lora_ga"):
        edit_json(adapter / "adapter_config.json", init_lora_weights=init)
        refused(base, [adapter], AdapterError, "has nothing for lin", read_options=options)
    edit_json(adapter / "adapter_config.json", init_lora_weights=True)
    notes = lorafold.plan(base, [adapter], read_options=options).notes
    assert any("the initial adapter is not used for adapter, whose init_lora_weights is True" in note for note in notes)

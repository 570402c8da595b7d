"""Every form of PEFT's LoRA that is not a plain linear layer: made by PEFT, perturbed, saved, merged from the files.

The formula in float64 is the oracle (`oracle.correctly_rounded`), PEFT's own merge in float64 the second opinion.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.errors import UnsupportedAdapterError
from models import save_adapter
from oracle import correctly_rounded, same_bits


def save_plain(model: nn.Module, path: Path, dtype: torch.dtype) -> Path:
    """A base of any torch module: its state dict and an empty configuration."""
    path.mkdir()
    save_file({name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 10, (3, 5), stride=2, bias=False)
        self.pointwise = nn.Conv2d(10, 12, 1)
        self.three = nn.Conv3d(4, 6, (1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions_of_every_dimension(tmp_path, dtype):
    torch.manual_seed(0)
    base = save_plain(Convs(), tmp_path / "base", dtype)
    held = load_file(base / "model.safetensors")
    model = Convs().double()
    model.load_state_dict({name: value.double() for name, value in held.items()})
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["one", "two", "pointwise", "three"])
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert report.plan.count("merge") == 4
    assert any("dilation" in note for note in report.plan.notes)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in ("one", "two", "pointwise", "three"):
        a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        update = lorafold.LowRankUpdate(a.flatten(1), b.flatten(1), 6 / 4)
        weight = held[f"{name}.weight"]
        expected = correctly_rounded(weight.flatten(1), [update], dtype)
        assert same_bits(merged[f"{name}.weight"].flatten(1), expected)
    assert torch.equal(merged["one.bias"], held["one.bias"])


def test_convolutions_as_peft_merges_them(tmp_path):
    """In float64 both sums are right to 2⁻⁵³ of numbers below 2 in size, over at most R + 1 = 5 terms."""
    import peft

    torch.manual_seed(1)
    model = Convs().double()
    base = save_plain(model, tmp_path / "base", torch.float64)
    adapter = save_adapter(model, tmp_path / "adapter", target_modules=["one", "two", "pointwise", "three"])
    lorafold.merge(base, [adapter], tmp_path / "out")
    fresh = Convs().double()
    fresh.load_state_dict(load_file(base / "model.safetensors"))
    theirs = peft.PeftModel.from_pretrained(fresh, adapter, autocast_adapter_dtype=False).merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert (value - theirs[name]).abs().max() <= 5 * 2.0**-52


def test_a_grouped_convolution_is_refused(tmp_path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, groups=2)

    base = save_plain(Grouped(), tmp_path / "base", torch.float32)
    adapter = save_adapter(Grouped(), tmp_path / "adapter", target_modules=["conv"])
    with pytest.raises(UnsupportedAdapterError, match="conv belongs to a convolution in 2 groups"):
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((base / "config.json").read_text()) == {}

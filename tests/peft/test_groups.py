"""Convolutions in groups: PEFT's update mixes the groups, so it is refused, or a dense convolution is written on request."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.engine import merge_outputs as writing
from lorafold.errors import PlanError, ShapeMismatchError, UnsupportedAdapterError
from models import refused, save_adapter
from oracle import correctly_rounded, same_bits

DENSE = ReadOptions(dense_groups=True)


class Grouped(nn.Module):
    def __init__(self, groups: tuple[int, int, int] = (2, 3, 4)) -> None:
        super().__init__()
        self.one = nn.Conv1d(8, 6, 3, groups=groups[0])
        self.two = nn.Conv2d(6, 12, (2, 3), groups=groups[1], bias=False)
        self.three = nn.Conv3d(12, 4, 1, groups=groups[2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).tanh().transpose(0, 1)[None]
        return self.three(self.two(x).tanh()[:, :, None])


def built(path: Path, dtype: torch.dtype, **config: Any) -> tuple[Path, Path, dict[str, Tensor]]:
    torch.manual_seed(9)
    base, model = path / "base", Grouped()
    base.mkdir()
    held = {name: value.to(dtype) for name, value in model.state_dict().items()}
    save_file(held, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    model.load_state_dict({name: value.float() for name, value in held.items()})
    return base, save_adapter(model, path / "adapter", target_modules=["one", "two", "three"], r=12, **config), held


def diagonal(weight: Tensor, groups: int) -> Tensor:
    """The weight of the dense convolution that does the same."""
    out, inner = weight.shape[:2]
    dense = weight.new_zeros(out, inner * groups, *weight.shape[2:])
    for o in range(out):
        group = o * groups // out
        dense[o, group * inner : (group + 1) * inner] = weight[o]
    return dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_on_request(tmp_path: Path, dtype: torch.dtype) -> None:
    """D[o, i, k] = s · Σ_j B[o, j] · A[group(o) · r / groups + j, i, k], on the base's weight in blocks on the diagonal."""
    import peft

    base, adapter, held = built(tmp_path, dtype)
    report = lorafold.merge(base, [adapter], tmp_path / "out", read_options=DENSE)
    merged, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert report.proof is not None
    assert report.proof.share == 1.0
    for name, groups in (("one", 2), ("two", 3), ("three", 4)):
        A, B = (own[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        wide = torch.zeros(B.shape[0], 12)
        for o in range(len(B)):
            each = 12 // groups
            group = o * groups // len(B)
            wide[o, group * each : (group + 1) * each] = B[o].flatten()
        dense = diagonal(held[f"{name}.weight"], groups)
        update = lorafold.LowRankUpdate(A.flatten(1), wide, 6 / 12)
        assert merged[f"{name}.weight"].shape == dense.shape
        assert same_bits(merged[f"{name}.weight"].flatten(1), correctly_rounded(dense.flatten(1), [update], dtype))
    assert any("the model must be built with groups=1 there" in note for note in report.plan.notes)
    assert lorafold.verify(tmp_path / "out", base, [adapter], read_options=DENSE).failures == ()

    lorafold.merge(base, [adapter], tmp_path / "wide", dtype="F64", read_options=DENSE)
    plain, mine = Grouped().double(), Grouped((1, 1, 1)).double()
    plain.load_state_dict({name: value.double() for name, value in held.items()})
    mine.load_state_dict(load_file(tmp_path / "wide" / "model.safetensors"))
    x = torch.randn(9, 8, 11, dtype=torch.float64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        right = peft.PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).eval()(x)
        assert (mine(x) - right).norm() / right.norm() < 1e-12


def test_two_adapters_on_one(tmp_path: Path) -> None:
    base, adapter, _ = built(tmp_path, torch.float32)
    other = save_adapter(Grouped(), tmp_path / "other", target_modules=["one"], r=4, seed=3)
    lorafold.merge(base, [adapter, (other, 0.5)], tmp_path / "out", read_options=DENSE)
    lorafold.merge(base, [(other, 0.5), adapter], tmp_path / "turned", read_options=DENSE)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "turned"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, held = built(tmp_path, torch.float32)
    monkeypatch.setattr(writing, "run", lambda *_, **__: pytest.fail("bytes were written before it was refused"))
    refused(base, [adapter], UnsupportedAdapterError, "one belongs to a convolution in 2 groups", "dense_groups=True")
    with pytest.raises(PlanError, match="is written as a dense convolution, of another shape than the base's"):
        lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo", read_options=DENSE)
    with pytest.raises(UnsupportedAdapterError):
        lorafold.merge_into(Grouped(), [adapter], read_options=DENSE)
    other = tmp_path / "other"
    other.mkdir()
    save_file(held | {"one.weight": diagonal(held["one.weight"], 2)}, other / "model.safetensors")
    (other / "config.json").write_text("{}")
    refused(other, [adapter], ShapeMismatchError, "one has lora_A", read_options=DENSE)

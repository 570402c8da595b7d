"""Several adapters on one weight where DoRA is among them: they count in the order in which they are given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold
from lorafold.engine import produce
from lorafold.kernel.rounding import to_nearest
from models import save_adapter

NAMES = ("linear", "conv", "embed", "c_attn")


class Mixed(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.linear, self.conv = nn.Linear(8, 12), nn.Conv2d(4, 6, (3, 2))
        self.embed, self.c_attn = nn.Embedding(20, 8), Conv1D(12, 8)


def base_of(path: Path, dtype: torch.dtype) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    path.mkdir()
    held = {name: value.to(dtype).contiguous() for name, value in Mixed().state_dict().items()}
    save_file(held, path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return path, held


def trained(held: dict[str, torch.Tensor], path: Path, seed: int, **config: Any) -> Path:
    model = Mixed()
    model.load_state_dict({name: value.float() for name, value in held.items()})
    return save_adapter(model, path, seed=seed, target_modules=list(NAMES), fan_in_fan_out=True, **config)


def one_after_another(weight: torch.Tensor, adapters: list[tuple[Path, float]], name: str) -> np.ndarray:
    """W_k = W_{k−1} + w·(m_k / ‖W_0 + D_k‖ · (W_{k−1} + D_k) − W_{k−1}) for DoRA, W_{k−1} + w·D_k for others."""
    part = "lora_embedding_{}" if name == "embed" else "lora_{}.weight"
    turned = name in ("embed", "c_attn")
    W = weight.double().numpy()
    first = (W.T if turned else W).reshape(W.shape[1] if turned else W.shape[0], -1)
    now = first
    for path, strength in adapters:
        held = load_file(path / "adapter_model.safetensors")
        A, B = (held[f"base_model.model.{name}." + part.format(each)].double().numpy() for each in "AB")
        D = 1.5 * B.reshape(len(B), -1) @ A.reshape(len(A), -1)
        m = held.get(f"base_model.model.{name}.lora_magnitude_vector")
        if m is None:
            now = now + strength * D
        else:
            factor = m.double().numpy().reshape(-1, 1) / np.linalg.norm(first + D, axis=1, keepdims=True)
            now = now + strength * (factor * (now + D) - now)
    return (now.T if turned else now).reshape(W.shape)


@pytest.mark.parametrize("least", [0, produce.LEAST])
@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_the_order_given(
    tmp_path: Path, dtype: torch.dtype, strengths: tuple[float, ...], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From file to file, and by memory."""
    monkeypatch.setattr(produce, "LEAST", least)
    base, held = base_of(tmp_path / "base", dtype)
    dora, plain, other = (
        trained(held, tmp_path / name, i, use_dora=name != "plain") for i, name in enumerate(("dora", "plain", "other"))
    )
    for i, order in enumerate(([dora, other], [other, dora], [dora, plain, other], [plain, dora])):
        given = list(zip(order, strengths, strict=False))
        report = lorafold.merge(base, given, tmp_path / f"out{i}")
        assert any("their order counts: as given" in note for note in report.plan.notes)
        assert report.proof is not None
        assert report.proof.share == 1.0
        merged = load_file(tmp_path / f"out{i}" / "model.safetensors")
        for name in NAMES:
            wanted = one_after_another(held[f"{name}.weight"], given, name)
            assert torch.equal(merged[f"{name}.weight"], to_nearest(torch.from_numpy(wanted), dtype)), (i, name)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
def test_as_peft_merges_them(tmp_path: Path) -> None:
    """In float64, to 2⁻⁴⁰: PEFT unmerges and merges again before each one, which leaves some roundings more."""
    import peft

    base, held = base_of(tmp_path / "base", torch.float64)
    one, two = (trained(held, tmp_path / name, i, use_dora=True) for i, name in enumerate(("one", "two")))
    lorafold.merge(base, [one, two], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Mixed().double()
        model.load_state_dict(held)
        wrapped = peft.PeftModel.from_pretrained(model, one, adapter_name="one", autocast_adapter_dtype=False)
        wrapped.load_adapter(two, adapter_name="two", autocast_adapter_dtype=False)
        wrapped.base_model.set_adapter(["one", "two"])
        theirs = wrapped.merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(value, theirs[name], rtol=2.0**-40, atol=2.0**-40), name


def test_dora_on_a_residual(tmp_path: Path) -> None:
    """PiSSA with DoRA: the norm is of what was left of the base, rounded to its dtype."""
    from peft_formulas import left_over

    base, held = base_of(tmp_path / "base", torch.bfloat16)
    model = Mixed().bfloat16()
    model.load_state_dict(held)
    config = {"target_modules": ["linear", "c_attn"], "use_dora": True, "init_lora_weights": "pissa", "fan_in_fan_out": True}
    adapter = save_adapter(model, tmp_path / "adapter", **config)
    lorafold.merge(base, [adapter], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("linear", "c_attn"):
        left = torch.from_numpy(left_over(held[f"{name}.weight"].double().numpy(), "pissa", 4, 1.5))
        wanted = one_after_another(to_nearest(left, torch.bfloat16), [(adapter, 1.0)], name)
        assert torch.equal(merged[f"{name}.weight"], to_nearest(torch.from_numpy(wanted), torch.bfloat16)), name

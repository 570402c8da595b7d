"""Codes that are hard to write: parts of matrices whose codes are stored transposed, and blocks whose scale holds nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from encoded_bases import IN, NAMES, OUT, adapted, awq, gptq, made, nf4
from lorafold.errors import LorafoldWarning, UnsupportedAdapterError
from quantised import raw, whole

PARTS = {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)}


def fused_base(folder: Path, kind: Any) -> Path:
    """Two layers of a Phi-3, of each the fused projection alone."""
    folder.mkdir()
    torch.manual_seed(2)
    held: dict[str, Tensor] = {}
    for i in (0, 1):
        parts, config = kind()
        held |= {f"model.layers.{i}.self_attn.qkv_proj.{name}": tensor for name, tensor in parts.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    heads = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(heads | {"quantization_config": config}))
    return folder


def adapter_of(folder: Path, module: str, pairs: dict[int, tuple[Tensor, Tensor]], **more: Any) -> Path:
    folder.mkdir()
    held = {}
    for i, (lora_A, lora_B) in pairs.items():
        start = f"base_model.model.model.layers.{i}.self_attn.{module}"
        held |= {f"{start}.lora_A.weight": lora_A, f"{start}.lora_B.weight": lora_B}
        if more:
            held[f"{start}.lora_magnitude_vector"] = torch.ones(lora_B.shape[0])
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))
    return folder


@pytest.mark.parametrize("kind", [gptq, awq, nf4], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("module", PARTS)
def test_a_part_of_a_fused_weight_is_the_whole_with_zeros(tmp_path: Path, kind: Any, module: str) -> None:
    base = fused_base(tmp_path / "base", kind)
    start, stop = PARTS[module]
    torch.manual_seed(6)
    pairs = {i: (torch.randn(4, IN), torch.randn(stop - start, 4) * 0.3) for i in (0, 1)}
    within = {i: (A, torch.nn.functional.pad(B, (0, 0, start, OUT - stop))) for i, (A, B) in pairs.items()}
    one = adapter_of(tmp_path / "one", module, pairs)
    two = adapter_of(tmp_path / "two", "qkv_proj", within)
    for adapter in (one, two):
        lorafold.merge(
            base, [adapter], tmp_path / f"out_{adapter.name}", output_format="same", undo=tmp_path / f"{adapter.name}.undo"
        )
        assert lorafold.verify(tmp_path / f"out_{adapter.name}", base, [adapter]).ok
    found, expected, before = (whole(tmp_path / name) for name in ("out_one", "out_two", "base"))
    assert all(raw(found[name]) == raw(expected[name]) for name in before)
    changed = {name for name in before if raw(found[name]) != raw(before[name])}
    assert len(changed) == 2
    plan = lorafold.plan(base, [one], output_format="same")
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert lorafold.run(tmp_path / "plan.json", tmp_path / "run").plan == plan
    lorafold.unmerge(tmp_path / "out_one", tmp_path / "restored", undo=tmp_path / "one.undo")
    assert (tmp_path / "restored" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_dora_of_a_part_is_refused(tmp_path: Path) -> None:
    base = fused_base(tmp_path / "base", gptq)
    pairs = {i: (torch.randn(4, IN), torch.randn(16, 4)) for i in (0, 1)}
    adapter = adapter_of(tmp_path / "adapter", "k_proj", pairs, use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="stored transposed, and rescales that"):
        lorafold.merge(base, [adapter], tmp_path / "out", output_format="same")
    lorafold.merge(base, [adapter], tmp_path / "out", output_format="bf16")


def test_what_no_code_can_state_is_counted(tmp_path: Path) -> None:
    """A block whose scale is zero, as that of nothing but zeros is: what an adapter adds there cannot be written."""
    base = made(tmp_path / "base", nf4)
    held = load_file(base / "model.safetensors")
    held["model.layers.0.q_proj.weight.absmax"][:3] = 0.0
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    adapter, _ = adapted(tmp_path / "adapter", 1e-3)
    with pytest.warns(LorafoldWarning, match=r"192 numbers in 1 tensor were far beyond the largest that the scale") as caught:
        report = lorafold.merge(base, [adapter], tmp_path / "out", output_format="same")
    assert report.clamped == {NAMES[0]: 192}
    assert "output_format='bf16'" in str(caught[0].message)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert raw(found[NAMES[0]][:96]) == raw(held[NAMES[0]][:96])
    assert lorafold.verify(tmp_path / "out", base, [adapter]).ok
    assert lorafold.merge(made(tmp_path / "whole", nf4), [adapter], tmp_path / "other", output_format="same").clamped == {}

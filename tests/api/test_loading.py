"""Outputs in a base's own codes, loaded by transformers itself: the logits of a model that has the decoded numbers.

What needs the vendors' packages is in ``scripts/check_loading.py``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lorafold
from lorafold.checkpoints.checkpoint import BaseReader
from models import edit_json, llama, save_adapter, save_base
from quantised import linear, to_fp8

TOKENS = torch.arange(12)[None]


def decoded(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint states, in float32."""
    checkpoint = lorafold.open_checkpoint(folder)
    with BaseReader(checkpoint) as reader:
        return {
            name: reader.rows(each, 0, each.shape[0]).view(each.shape).float().clone() for name, each in checkpoint.tensors.items()
        }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


@pytest.mark.parametrize("from_original", [False, True])
def test_fp8_blocks(tmp_path: Path, from_original: bool) -> None:
    """Whole blocks, since transformers takes their size from the grid of scales."""
    import transformers

    original, base = save_base(llama(), tmp_path / "original"), save_base(llama(), tmp_path / "base")
    to_fp8(base, dict.fromkeys(linear(), (8, 8)), weight_block_size=[8, 8], activation_scheme="dynamic")
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"])
    how: dict[str, Any] = {"requantise_from": original} if from_original else {"output_format": "same"}
    lorafold.merge(base, [adapter], tmp_path / "out", **how)
    config = transformers.FineGrainedFP8Config(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, device_map="cpu", quantization_config=config
        )
    plain = llama()
    plain.load_state_dict(decoded(tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(plain))


def test_gpt_oss(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model, base = transformers.GptOssForCausalLM(config), tmp_path / "base"
    adapter = save_adapter(transformers.GptOssForCausalLM(config), tmp_path / "adapter", target_modules=["q_proj"],
                           target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])  # fmt: skip
    held = {name: tensor.clone().bfloat16() for name, tensor in model.state_dict().items()}
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = held.pop(name).shape
        held[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        held[f"{name}_scales"] = torch.randint(120, 124, (experts, outer, inner // 32), dtype=torch.uint8)
    base.mkdir()
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = ["GptOssForCausalLM"], "bfloat16"
    config.save_pretrained(base)
    edit_json(base / "config.json", quantization_config={"quant_method": "mxfp4"})
    lorafold.merge(base, [adapter], tmp_path / "out", output_format="same")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32, device_map="cpu", quantization_config=transformers.Mxfp4Config(dequantize=True)
        )
    state = decoded(tmp_path / "out")
    model.load_state_dict(state)
    assert {name: each.dtype for name, each in loaded.state_dict().items()}.keys() == state.keys()
    for name, each in loaded.state_dict().items():
        assert torch.equal(each.float(), state[name]), name
    assert torch.equal(logits(loaded.float()), logits(model.float()))

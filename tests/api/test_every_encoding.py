"""A model in each encoding, merged into floats and into its own codes, verified, and taken apart again.

What a stored weight states is for `tests/checkpoints/encodings` to check; here that is taken as given, and what becomes of it is
held to fractions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from encoded_bases import KINDS, NAMES, Made, adapted, fp8, gptq, int8, made, nf4, numbers, nvfp4
from oracle import correctly_rounded, same_bits
from quantised import raw, whole


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_merged_into_floats_and_into_codes(tmp_path: Path, kind: Callable[[], Made]) -> None:
    base = made(tmp_path / "base", kind)
    checkpoint = lorafold.open_checkpoint(base)
    assert checkpoint.tensors.keys() == {*NAMES, *(f"{name.removesuffix('weight')}bias" for name in NAMES), "model.norm.weight"}
    before, held = numbers(checkpoint, NAMES), whole(base)
    adapter, updates = adapted(tmp_path / "adapter", 0.03 * float(before[NAMES[0]].std()))

    floats = lorafold.merge(base, [adapter], tmp_path / "floats", output_format="bf16", undo=tmp_path / "undo_floats")
    found = whole(tmp_path / "floats")
    assert found.keys() == checkpoint.tensors.keys()
    for name in NAMES:
        assert same_bits(found[name], correctly_rounded(before[name], [updates[name]], torch.bfloat16))
    assert json.loads((tmp_path / "floats" / "config.json").read_text()) == {"dtype": "bfloat16"}
    assert floats.kept_in_all > 0.9

    lorafold.merge(base, [adapter], tmp_path / "codes", output_format="same", undo=tmp_path / "undo_codes")
    again = whole(tmp_path / "codes")
    changed = {name for name in held if raw(again[name]) != raw(held[name])}
    assert changed == {checkpoint.encoded[name].stored[0] for name in NAMES}
    after = numbers(lorafold.open_checkpoint(tmp_path / "codes"), NAMES)
    for name, update in updates.items():
        delta = update.scaling * (update.lora_B.double() @ update.lora_A.double())
        moved = after[name] - before[name]
        # E[moved] = ΔW within the codes' range; the deviation of the mean over 8,192 numbers from chance is below 0.05 of it
        assert 0.8 < float((moved * delta).sum() / (delta * delta).sum()) < 1.2

    for out, undo in (("floats", "undo_floats"), ("codes", "undo_codes")):
        assert lorafold.verify(tmp_path / out, base, [adapter]).ok
        lorafold.unmerge(tmp_path / out, tmp_path / f"{out}_by_undo", undo=tmp_path / undo)
        lorafold.unmerge(tmp_path / out, tmp_path / f"{out}_by_base", base=base)
        for restored in ("by_undo", "by_base"):
            for file in base.iterdir():
                assert (tmp_path / f"{out}_{restored}" / file.name).read_bytes() == file.read_bytes()

    nothing, _ = adapted(tmp_path / "nothing", 0.0)
    lorafold.merge(base, [nothing], tmp_path / "same", output_format="same")
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Stacks in MXFP4, stored (E, out, …) and in the model (E, in, out); an adapter by PEFT on both, and on attention in floats."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model, base = transformers.GptOssForCausalLM(config), tmp_path / "base"
    base.mkdir()
    held = {name: tensor.clone().bfloat16() for name, tensor in model.state_dict().items()}
    stacks = {each: f"model.layers.0.mlp.experts.{each}" for each in ("gate_up_proj", "down_proj")}
    for name in stacks.values():
        experts, inner, outer = held.pop(name).shape
        held[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        held[f"{name}_scales"] = torch.randint(118, 122, (experts, outer, inner // 32), dtype=torch.uint8)
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(base)
    stated = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (base / "config.json").write_text(json.dumps(stated))
    parameters = [f"mlp.experts.{each}" for each in stacks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about transformers' deprecations
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=parameters)
        )
        deltas = {}
        for module in wrapped.modules():
            if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
                torch.nn.init.normal_(module.lora_B["default"].weight, std=0.05)
                deltas[stacks[module.parameter_name]] = module.get_delta_weight("default").detach().double()
        wrapped.save_pretrained(tmp_path / "adapter")
    checkpoint = lorafold.open_checkpoint(base)
    before = numbers(checkpoint, list(stacks.values()))
    lorafold.merge(base, [tmp_path / "adapter"], tmp_path / "floats", output_format="bf16")
    found = load_file(tmp_path / "floats" / "model.safetensors")
    for name, delta in deltas.items():
        # PEFT sums ΔW in float32, whose last bits may decide a tie
        assert (found[name] == (before[name] + delta).bfloat16()).double().mean() > 0.999
    loaded = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], found[name].float()) for name in found)
    lorafold.merge(base, [tmp_path / "adapter"], tmp_path / "codes", output_format="same")
    again = load_file(tmp_path / "codes" / "model.safetensors")
    assert {name for name in held if raw(again[name]) != raw(held[name])} == {f"{name}_blocks" for name in stacks.values()}
    after = numbers(lorafold.open_checkpoint(tmp_path / "codes"), list(stacks.values()))
    for name, delta in deltas.items():
        inside = before[name].abs() < before[name].abs().amax(dim=1, keepdim=True)
        moved = ((after[name] - before[name]) * delta)[inside].sum() / (delta * delta)[inside].sum()
        assert 0.7 < float(moved) < 1.3, name  # by chance within 0.1
    assert lorafold.verify(tmp_path / "codes", base, [tmp_path / "adapter"]).ok


@pytest.mark.parametrize("kind", [nf4, int8, fp8, nvfp4, gptq], ids=lambda kind: kind.__name__)
def test_flushed_subnormal_numbers_change_no_bit(tmp_path: Path, kind: Callable[[], Made]) -> None:
    """Scales so small that many of the numbers are subnormal in bfloat16."""
    base = made(tmp_path / "base", kind)
    held = whole(base)
    small = {"absmax": 2.0**-128, "SCB": 2.0**-126, "weight_scale_inv": 2.0**-131, "weight_scale_2": 2.0**-126, "scales": 2.0**-24}
    held |= {name: tensor * small[name.split(".")[-1]] for name, tensor in held.items() if name.split(".")[-1] in small}
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, base / "model.safetensors", metadata={"format": "pt"})
    size = 2.0**-24 if kind is gptq else 2.0**-129
    adapter, _ = adapted(tmp_path / "adapter", size)
    for number, output in enumerate(("bf16", "same")):
        places = []
        for flushed in (False, True):
            torch.set_flush_denormal(flushed)
            try:
                place = tmp_path / f"{number}{flushed}"
                lorafold.merge(base, [adapter], place, output_format=output, rounding="stochastic", seed=2)
            finally:
                torch.set_flush_denormal(False)
            places.append((place / "model.safetensors").read_bytes())
        assert places[0] == places[1]

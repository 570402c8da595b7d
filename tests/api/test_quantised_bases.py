"""What a quantised base says of itself, and what of it is refused: a clear error each, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorafold
from lorafold.errors import CheckpointError, InputError, PlanError, UnsupportedAdapterError
from models import edit_json, llama, save_adapter, save_base
from oracle import correctly_rounded, same_bits
from quantised import BLOCK, Fp8Llama, codes_of, linear, raw, to_fp8, uniform, updates_in, whole, wide


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Fp8Llama:
    return Fp8Llama(tmp_path_factory.mktemp("fp8"))


def test_inspect_explains_it(case: Fp8Llama, tmp_path: Path) -> None:
    found = lorafold.inspect(case.base)
    assert found.details["quantisation"] == {"method": "fp8", "file": "config.json"}
    assert found.details["encoded"] == 14
    assert "FP8 with a scale for each block of 24 × 16" in found.details["parameters_by_dtype"]
    assert "14 weights that can be decoded; config.json says fp8" in str(found)
    assert "quantisation" not in lorafold.inspect(save_base(llama(), tmp_path / "plain")).details


def test_nothing_is_written_until_the_output_is_said(case: Fp8Llama, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is quantised \(FP8 with a scale for each block of 24 × 16\)") as caught:
        lorafold.merge(case.base, [case.adapter], tmp_path / "out")
    assert "`output_format='same'`" in str(caught.value.hint)
    assert "`output_format='bf16'`" in str(caught.value.hint)
    with pytest.raises(PlanError, match="`dtype` were given"):
        lorafold.plan(case.base, [case.adapter], output_format="bf16", dtype="float32")
    with pytest.raises(PlanError, match="output_format must be"):
        lorafold.plan(case.base, [case.adapter], output_format="q4")  # type: ignore[arg-type]
    plain = save_base(llama(), tmp_path / "plain")
    with pytest.raises(PlanError, match="is not quantised") as caught:
        lorafold.plan(plain, [case.adapter], output_format="bf16")
    assert "dtype='bfloat16'" in str(caught.value.hint)
    with pytest.raises(PlanError, match="alone has none"):
        lorafold.plan(case.base, [case.adapter], output_format="bf16", only_changed=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_floats_alone_needs_no_word(tmp_path: Path) -> None:
    """Of a mixed base the quantised weights that nobody changes are copied, byte for byte."""
    base, adapter = save_base(llama(), tmp_path / "base"), tmp_path / "adapter"
    names = {name: block for name, block in linear().items() if "q_proj" not in name}
    to_fp8(base, names, weight_block_size=list(BLOCK))
    save_adapter(llama(), adapter, target_modules=["q_proj"])
    before = whole(base)
    for i, options in enumerate(({}, {"output_format": "same"}, {"dtype": "float32"})):
        lorafold.merge(base, [adapter], tmp_path / f"out{i}", **options)
        after = whole(tmp_path / f"out{i}")
        assert after.keys() == before.keys()
        assert all(raw(after[n]) == raw(before[n]) for each in names for n in (each, f"{each}_scale_inv"))
        assert (after["model.norm.weight"].dtype == torch.float32) == ("dtype" in options)


def test_what_says_how_the_base_is_quantised_goes_or_stays(case: Fp8Llama, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    (base / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    edit_json(base / "config.json", text_config={"torch_dtype": "float16", "quantization_config": {"x": 1}}, compression_config={})
    edit_tensors_of(
        base, {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    )
    report = lorafold.merge(base, [case.adapter], tmp_path / "bf16", output_format="bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["text_config"] == {"torch_dtype": "bfloat16"}
    assert not {"quantization_config", "compression_config"} & config.keys()
    assert not (tmp_path / "bf16" / "hf_quant_config.json").exists()
    assert not [name for name in whole(tmp_path / "bf16") if "_scale" in name]
    for part in ("input_scale", "hf_quant_config.json", "loses most of the adapter"):
        assert any(part in note for note in report.plan.notes), part
    assert "loses most of the adapter" in (tmp_path / "bf16" / "README.md").read_text()
    assert lorafold.verify(tmp_path / "bf16", base, [case.adapter]).ok
    lorafold.merge(base, [case.adapter], tmp_path / "same", output_format="same")
    for name in ("hf_quant_config.json", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (base / name).read_bytes()
    assert whole(tmp_path / "same").keys() == whole(base).keys()
    assert lorafold.verify(tmp_path / "same", base, [case.adapter]).ok
    (tmp_path / "bf16" / "hf_quant_config.json").write_text("{}")
    assert not lorafold.verify(tmp_path / "bf16", base, [case.adapter]).ok


def edit_tensors_of(base: Path, more: dict[str, Tensor]) -> None:
    """Add tensors to the first file of a base with an index."""
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = sorted(set(index["weight_map"].values()))[0]
    save_file(load_file(base / file) | more, base / file, metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(more, file)
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


REFUSED = {
    "rotated": ({"transform_config": {"config_groups": {"R1": {}}}}, "weights are rotated"),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    "marlin": ({"format": "marlin-24"}, "marlin-24"),
    "eetq": ({"quant_method": "eetq"}, "permuted for one kind of GPU"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("output_format", ["bf16", "same", None])
def test_what_cannot_be_decoded_is_refused_with_the_reason(case: Fp8Llama, tmp_path: Path, kind: str, output_format: Any) -> None:
    base, (fields, reason) = tmp_path / "base", REFUSED[kind]
    shutil.copytree(case.base, base)
    edit_json(base / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": list(BLOCK)} | fields)
    with pytest.raises(CheckpointError, match=reason):
        lorafold.merge(base, [case.adapter], tmp_path / "out", output_format=output_format)
    assert reason in str(lorafold.inspect(base))


def test_factors_before_a_layer_are_refused(case: Fp8Llama, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    edit_tensors_of(base, {"model.layers.0.self_attn.q_proj.pre_quant_scale": torch.ones(32)})
    for output_format in ("bf16", "same"):
        with pytest.raises(CheckpointError, match="pre_quant_scale"):
            lorafold.merge(base, [case.adapter], tmp_path / "out", output_format=output_format)


def test_a_configuration_without_tensors_and_tensors_without_scales(case: Fp8Llama, tmp_path: Path) -> None:
    plain = save_base(llama(), tmp_path / "plain")
    edit_json(plain / "config.json", quantization_config={"quant_method": "fp8"})
    for output_format in ("bf16", "same", None):
        with pytest.raises(CheckpointError, match=r"config.json says that it is quantised \(fp8\), but no tensor is stored so"):
            lorafold.plan(plain, [case.adapter], output_format=output_format)
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    name = "model.layers.0.self_attn.k_proj.weight"
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = base / index["weight_map"].pop(f"{name}_scale_inv")
    save_file({n: t for n, t in load_file(file).items() if n != f"{name}_scale_inv"}, file, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{name}' is of type F8_E4M3.*beside it"):
        lorafold.plan(base, [case.adapter], output_format="bf16")


def test_metadata_on_how_tensors_are_quantised_goes(case: Fp8Llama, tmp_path: Path) -> None:
    """As torchao writes it: a field of each tensor's name, and a list of them."""
    base, name = tmp_path / "base", "model.layers.0.self_attn.q_proj.weight"
    shutil.copytree(case.base, base)
    file = next(file for file in base.glob("*.safetensors") if name in load_file(file))
    said = {"format": "pt", name: '{"_type": "Float8Tensor"}', "tensor_names": json.dumps([name]), "author": "me"}
    save_file(load_file(file), file, metadata=said)
    lorafold.merge(base, [case.adapter], tmp_path / "bf16", output_format="bf16")
    lorafold.merge(base, [case.adapter], tmp_path / "same", output_format="same")
    for out, left in (("bf16", {"format": "pt", "author": "me"}), ("same", said)):
        with safe_open(tmp_path / out / file.name, "pt") as opened:
            assert opened.metadata() == left
        assert lorafold.verify(tmp_path / out, base, [case.adapter]).ok


def test_scales_may_lie_in_another_file(case: Fp8Llama, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    scales = {name: tensor for name, tensor in case.held.items() if name.endswith("_scale_inv")}
    for file in base.glob("*.safetensors"):
        save_file({n: t for n, t in load_file(file).items() if n not in scales}, file, metadata={"format": "pt"})
    save_file(scales, base / "scales.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for output_format in ("bf16", "same"):
        for each in (base, case.base):
            lorafold.merge(each, [case.adapter], tmp_path / f"{each == base}", output_format=output_format, overwrite=True)
        one, other = whole(tmp_path / "True"), whole(tmp_path / "False")
        assert one.keys() == other.keys()
        assert all(raw(one[name]) == raw(other[name]) for name in one)
        assert lorafold.verify(tmp_path / "True", base, [case.adapter]).ok
        assert (tmp_path / "True" / "scales.safetensors").exists() == (output_format == "same")


def test_layers_that_are_copies_have_scales_of_their_own(case: Fp8Llama, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(case.base, base)
    edit_tensors_of(base, {"model.layers.1.self_attn.k_proj.input_scale": torch.ones(1)})
    save_adapter(llama(layers=3), adapter, target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]], base_model_name_or_path=None)
    held, updates = whole(base), updates_in(adapter)
    lorafold.merge(base, [adapter], tmp_path / "same", output_format="same")
    lorafold.merge(base, [adapter], tmp_path / "bf16", output_format="bf16")
    found, floats = whole(tmp_path / "same"), whole(tmp_path / "bf16")
    for part in ("k_proj.weight", "k_proj.weight_scale_inv", "k_proj.input_scale", "q_proj.weight_scale_inv"):
        assert raw(found[f"model.layers.2.self_attn.{part}"]) == raw(held[f"model.layers.1.self_attn.{part}"])
    one, two = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (1, 2))
    expected = correctly_rounded(torch.from_numpy(case.numbers[one]), updates[two], torch.bfloat16)
    assert same_bits(floats[two], expected)
    noise = uniform(0, two, held[one].numel())
    codes = codes_of(wide(case.numbers[one], updates[two]), case.scale(one), held[one].view(torch.uint8).numpy(), noise)
    assert np.array_equal(found[two].view(torch.uint8).numpy(), codes)


def test_names_of_bases_are_hints(case: Fp8Llama, tmp_path: Path) -> None:
    adapter, plain = tmp_path / "adapter", save_base(llama(), tmp_path / "plain")
    shutil.copytree(case.adapter, adapter)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="unsloth/llama-bnb-4bit")
    assert any("trained against those weights" in note for note in lorafold.plan(plain, [adapter]).notes)
    quantised_base = lorafold.plan(case.base, [adapter], output_format="bf16")
    assert not any("trained against those weights" in note for note in quantised_base.notes)


def test_a_start_that_left_a_residual_is_refused(case: Fp8Llama, tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa_niter_4")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(InputError, match="pissa"):
        lorafold.plan(case.base, [adapter], output_format="bf16")


def test_what_replaces_a_weight_has_no_scales(case: Fp8Llama, tmp_path: Path) -> None:
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(UnsupportedAdapterError, match="replaces it as a whole"):
        lorafold.plan(case.base, [adapter], output_format="same")
    lorafold.merge(case.base, [adapter], tmp_path / "out", output_format="bf16")
    found, held = whole(tmp_path / "out"), load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    saved = next(tensor for key, tensor in held.items() if "0.mlp.down_proj" in key)
    assert torch.equal(found[name], saved.bfloat16())


def test_damaged_codes_are_found(case: Fp8Llama, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(case.base, base)
    name = "model.layers.0.self_attn.q_proj.weight"
    file = next(file for file in base.glob("*.safetensors") if name in load_file(file))
    held = load_file(file)
    held[name].view(torch.uint8)[3, 4] = 0x7F
    save_file(held, file, metadata={"format": "pt"})
    for output_format in ("bf16", "same"):
        with pytest.raises(InputError, match=r"not finite in the base, the first at \[3, 4\]"):
            lorafold.merge(base, [case.adapter], tmp_path / "out", output_format=output_format)
    lorafold.merge(base, [case.adapter], tmp_path / "out", output_format="same", allow_nonfinite_base=True)
    assert whole(tmp_path / "out")[name].view(torch.uint8)[3, 4] == 0x7F

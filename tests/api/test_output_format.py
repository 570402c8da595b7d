"""Quantised bases: floats or the same codes out, against an oracle of numpy and fractions, and loaded by transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold import LowRankUpdate
from lorafold.errors import LorafoldWarning, PlanError
from models import edit_json, edit_tensors, llama, plain_adapter, save_adapter, save_base
from oracle import correctly_rounded, same_bits
from quantised import (
    BLOCK,
    LINEAR,
    Fp8Llama,
    codes_of,
    linear,
    quantised,
    raw,
    spread,
    stated,
    to_fp8,
    uniform,
    updates_in,
    whole,
    wide,
)

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Fp8Llama:
    return Fp8Llama(tmp_path_factory.mktemp("fp8"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_floats_are_the_exact_sum_rounded_once(case: Fp8Llama, tmp_path: Path, output_format: Any) -> None:
    out, dtype = tmp_path / "out", FORMATS[output_format]
    report = lorafold.merge(case.base, [case.adapter], out, output_format=output_format)
    found, updates = whole(out), updates_in(case.adapter)
    assert found.keys() == {name for name in case.held if not name.endswith("_scale_inv")}
    assert len(updates) == 6
    for name, tensor in found.items():
        if name in case.numbers:
            assert tensor.dtype == dtype
            assert same_bits(tensor, correctly_rounded(torch.from_numpy(case.numbers[name]), updates.get(name, []), dtype)), name
        else:
            assert raw(tensor) == raw(case.held[name])
    config, before = (json.loads((each / "config.json").read_text()) for each in (out, case.base))
    assert before.pop("quantization_config")
    assert config == before | {"dtype": str(dtype).removeprefix("torch.")}
    assert report.plan.count("merge") == 6
    assert report.plan.count("cast") == 8
    assert report.proof is not None
    assert report.proof.ok
    assert lorafold.verify(out, case.base, [case.adapter]).ok
    assert lorafold.verify(out).ok


def test_transformers_runs_the_output(case: Fp8Llama, tmp_path: Path) -> None:
    """As decode-and-run: the very numbers, put into the model by hand, give the same logits."""
    import transformers

    lorafold.merge(case.base, [case.adapter], tmp_path / "out", output_format="fp32")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    updates = updates_in(case.adapter)
    state = {name: tensor.float() for name, tensor in case.held.items() if not name.endswith("_scale_inv")}
    for name, numbers in case.numbers.items():
        rounded = correctly_rounded(torch.from_numpy(numbers), updates.get(name, []), torch.float32)
        state[name] = torch.from_numpy(rounded).float()
    by_hand = llama()
    by_hand.load_state_dict(state)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, by_hand.float().eval()(tokens).logits)


@pytest.mark.parametrize("rounding", [None, "stochastic", "nearest"])
def test_codes_are_one_of_two_neighbours_and_all_else_is_the_base(case: Fp8Llama, tmp_path: Path, rounding: Any) -> None:
    out = tmp_path / "out"
    report = lorafold.merge(case.base, [case.adapter], out, output_format="same", rounding=rounding, seed=7)
    found, updates = whole(out), updates_in(case.adapter)
    for name, tensor in case.held.items():
        if name not in updates:
            assert raw(found[name]) == raw(tensor), name
            continue
        old = tensor.view(torch.uint8).numpy()
        noise = None if rounding == "nearest" else uniform(7, name, tensor.numel())
        expected = codes_of(wide(case.numbers[name], updates[name]), case.scale(name), old, noise)
        assert np.array_equal(found[name].view(torch.uint8).numpy(), expected), name
    assert (out / "config.json").read_bytes() == (case.base / "config.json").read_bytes()
    assert report.kept_by_encoding.keys() == {"FP8 with a scale for each block of 24 × 16"}
    assert report.proof is not None
    assert report.proof.ok
    assert lorafold.verify(out, case.base, [case.adapter]).ok
    receipt = json.loads((out / "lorafold.json").read_text())
    assert (receipt["output_format"], receipt["rounding"], receipt["seed"]) == ("same", rounding, 7)
    name = next(iter(updates))
    assert receipt["tensors"][name]["encoding"] == "FP8 with a scale for each block of 24 × 16"


def test_an_update_of_zero_gives_the_same_files(case: Fp8Llama, tmp_path: Path) -> None:
    adapter = tmp_path / "zero"
    shutil.copytree(case.adapter, adapter)
    edit_tensors(adapter, lambda held: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in held.items()})
    lorafold.merge(case.base, [adapter], tmp_path / "out", output_format="same")
    files = [file.name for file in case.base.iterdir() if "index" not in file.name]
    assert files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (case.base / name).read_bytes(), name


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_the_base_comes_back(case: Fp8Llama, tmp_path: Path, output_format: Any) -> None:
    undo, out = tmp_path / "undo.safetensors", tmp_path / "out"
    report = lorafold.merge(case.base, [case.adapter], out, output_format=output_format, undo=undo)
    assert report.undo_bytes > 0
    lorafold.unmerge(out, tmp_path / "by_base", base=case.base)
    lorafold.unmerge(out, tmp_path / "by_undo", undo=undo)
    for file in case.base.iterdir():
        for restored in ("by_base", "by_undo"):
            assert (tmp_path / restored / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_several_adapters_are_one_sum(case: Fp8Llama, tmp_path: Path, output_format: Any) -> None:
    other = save_adapter(llama(), tmp_path / "other", seed=9, target_modules=["q_proj"], r=2)
    given: list[Any] = [(case.adapter, 0.5), other]
    for i, adapters in enumerate((given, given[::-1])):
        lorafold.merge(case.base, adapters, tmp_path / f"out{i}", output_format=output_format)
    one, two = whole(tmp_path / "out0"), whole(tmp_path / "out1")
    assert all(raw(one[name]) == raw(two[name]) for name in one)
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = (updates_in(each)[name][0] for each in (case.adapter, other))
    both = [LowRankUpdate(first.lora_A, first.lora_B, first.scaling * 0.5), second]
    if output_format == "bf16":
        assert same_bits(one[name], correctly_rounded(torch.from_numpy(case.numbers[name]), both, torch.bfloat16))
        return
    size = case.scale(name) * 32  # the largest step of E4M3, in units of the scale
    moved = stated(one[name], case.held[f"{name}_scale_inv"], BLOCK) - wide(case.numbers[name], both)
    clipped = np.abs(wide(case.numbers[name], both)) > 448 * case.scale(name)
    assert (np.abs(moved) <= size)[~clipped].all()


def test_one_reading_for_each_of_several(case: Fp8Llama, tmp_path: Path) -> None:
    other = save_adapter(llama(), tmp_path / "other", seed=9, target_modules=["q_proj"], r=2)
    (tmp_path / "outs").mkdir()
    for output_format in ("bf16", "same"):
        reports = lorafold.merge_each(
            case.base, [case.adapter, other], tmp_path / "outs", output_format=output_format, overwrite=True
        )
        for report, adapter in zip(reports, (case.adapter, other), strict=True):
            lorafold.merge(case.base, [adapter], tmp_path / "alone", output_format=output_format, overwrite=True)
            one, alone = whole(Path(report.out)), whole(tmp_path / "alone")
            assert all(raw(one[name]) == raw(alone[name]) for name in alone)


@pytest.mark.parametrize("output_format", ["fp32", "same"])
def test_dora_rescales_what_the_codes_state(tmp_path: Path, output_format: Any) -> None:
    """W′ = m · (W + ΔW) / ‖W + ΔW‖ of the decoded W, in float64; within two roundings, or one step of a code."""
    case = Fp8Llama(tmp_path, use_dora=True)
    held, config = (
        load_file(case.adapter / "adapter_model.safetensors"),
        json.loads((case.adapter / "adapter_config.json").read_text()),
    )
    lorafold.merge(case.base, [case.adapter], tmp_path / "out", output_format=output_format)
    found, name = whole(tmp_path / "out"), "model.layers.1.mlp.down_proj.weight"
    start = f"base_model.model.{name.removesuffix('.weight')}"
    update = LowRankUpdate(held[f"{start}.lora_A.weight"], held[f"{start}.lora_B.weight"], config["lora_alpha"] / config["r"])
    total = wide(case.numbers[name], [update])
    expected = total * (held[f"{start}.lora_magnitude_vector"].double().numpy() / np.linalg.norm(total, axis=1))[:, None]
    if output_format == "fp32":
        assert np.allclose(found[name].double().numpy(), expected, rtol=2.0**-23, atol=0)
        return
    made = stated(found[name], case.held[f"{name}_scale_inv"], BLOCK)
    inside = np.abs(expected) <= 448 * case.scale(name)
    assert (np.abs(made - expected) <= np.maximum(np.abs(expected) / 8, 2.0**-9 * case.scale(name)) * (1 + 2.0**-40))[inside].all()


def test_blocks_of_rows_and_little_memory_change_nothing(case: Fp8Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafold.engine import blocks

    for output_format in ("bf16", "same"):
        lorafold.merge(case.base, [case.adapter], tmp_path / "whole", output_format=output_format, overwrite=True)
        with monkeypatch.context() as patched:
            patched.setattr(blocks, "BLOCK_BYTES", 8 * 32 * 3)
            report = lorafold.merge(
                case.base, [case.adapter], tmp_path / "cut", output_format=output_format, max_memory="200MB", overwrite=True
            )
        assert report.proof
        one, two = whole(tmp_path / "whole"), whole(tmp_path / "cut")
        assert all(raw(one[name]) == raw(two[name]) for name in one)


def test_a_plan_says_what_becomes_of_each_and_runs_from_its_json(case: Fp8Llama, tmp_path: Path) -> None:
    for output_format in ("bf16", "same"):
        plan = lorafold.plan(case.base, [case.adapter], output_format=output_format)
        text = plan.summary(everything=True).text() if hasattr(plan.summary(), "text") else str(plan)
        assert "FP8 with a scale for each block of 24 × 16" in text
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
        assert lorafold.run(tmp_path / "plan.json", tmp_path / output_format).plan == plan
    assert "goes" in str(lorafold.plan(case.base, [case.adapter], output_format="bf16"))


def test_nearest_is_refused_where_it_loses_the_adapter(case: Fp8Llama, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(case.adapter, small)
    edit_tensors(small, lambda held: {n: t * 2e-3 if "lora_B" in n else t for n, t in held.items()})
    with pytest.raises(PlanError, match=r"only \d+% of the update would survive") as caught:
        lorafold.merge(case.base, [small], tmp_path / "out", output_format="same", rounding="nearest")
    assert "`rounding='stochastic'`" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    report = lorafold.merge(case.base, [small], tmp_path / "out", output_format="same")
    assert report.warnings == ()


def test_nearest_warns_where_it_loses_some(case: Fp8Llama, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(case.adapter, some)
    edit_tensors(some, lambda held: {n: t * 0.06 if "lora_B" in n else t for n, t in held.items()})
    with pytest.warns(LorafoldWarning, match="survived the rounding to FP8"):
        report = lorafold.merge(case.base, [some], tmp_path / "out", output_format="same", rounding="nearest")
    assert 0.5 < report.kept_in_all < 0.9


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_tied_ends_in_codes(tmp_path: Path, output_format: Any) -> None:
    """An embedding in FP8 to which the head is tied, and an adapter of one end: both are written, with scales of their own."""
    base = save_base(llama(tied=True), tmp_path / "base")
    adapter = save_adapter(llama(tied=True), tmp_path / "adapter", target_modules=["embed_tokens"])
    edit_tensors(adapter, lambda held: {n: t for n, t in held.items() if "lora_" in n})  # PEFT saves the floats too
    name = "model.embed_tokens.weight"
    numbers = to_fp8(base, {name: BLOCK}, weight_block_size=list(BLOCK))
    held = whole(base)
    lorafold.merge(base, [adapter], tmp_path / "out", output_format=output_format)
    found = whole(tmp_path / "out")
    if output_format == "bf16":
        assert same_bits(found["lm_head.weight"], correctly_rounded(torch.from_numpy(numbers[name]), [], torch.bfloat16))
    else:
        assert raw(found["lm_head.weight"]) == raw(held[name])
        assert raw(found["lm_head.weight_scale_inv"]) == raw(held[f"{name}_scale_inv"])
    assert raw(found[name]) != raw(found["lm_head.weight"])
    assert lorafold.verify(tmp_path / "out", base, [adapter]).ok


def test_rows_with_scales_of_compressed_tensors(tmp_path: Path) -> None:
    """A Llama as llm-compressor writes FP8: ``weight_scale`` (out, 1) in bfloat16, its configuration in its own words."""
    base, names = save_base(llama(), tmp_path / "base"), list(linear())
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=list(LINEAR))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    numbers = {}
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        for name in [name for name in held if name in names]:
            columns = held[name].shape[1]
            codes, scales = quantised(held[name], (1, columns))
            scales = scales.bfloat16()
            held |= {name: codes, f"{name}_scale": scales}
            numbers[name] = stated(codes, scales, (1, columns))
            index["weight_map"][f"{name}_scale"] = file.name
        save_file(held, file, metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    edit_json(base / "config.json", quantization_config={**config, "config_groups": {"group_0": group}, "sparsity_config": {}})
    lorafold.merge(base, [adapter], tmp_path / "out", output_format="bf16")
    found, updates = whole(tmp_path / "out"), updates_in(adapter)
    for name in names:
        assert same_bits(found[name], correctly_rounded(torch.from_numpy(numbers[name]), updates[name], torch.bfloat16))
    lorafold.merge(base, [adapter], tmp_path / "same", output_format="same")
    again, held = whole(tmp_path / "same"), whole(base)
    for name in names:
        scale = np.broadcast_to(held[f"{name}_scale"].double().numpy(), tuple(held[name].shape))
        noise = uniform(0, name, held[name].numel())
        expected = codes_of(wide(numbers[name], updates[name]), scale, held[name].view(torch.uint8).numpy(), noise)
        assert np.array_equal(again[name].view(torch.uint8).numpy(), expected)
        assert raw(again[f"{name}_scale"]) == raw(held[f"{name}_scale"])


def deepseek(folder: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """DeepSeek-V3's names and its compressed keys, 512 + 64 = 576 rows; as it is published, 128 × 128; and a stack of experts."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    torch.manual_seed(3)
    shapes = {
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 160),
        "model.layers.0.self_attn.q_a_proj.weight": (192, 160),
        **{f"model.layers.0.mlp.experts.{i}.gate_proj.weight": (40, 160) for i in range(2)},
    }
    save_file({name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    numbers = to_fp8(base, dict.fromkeys(shapes, (128, 128)), weight_block_size=[128, 128], fmt="e4m3")
    adapter.mkdir()
    held = {}
    for name, (rows, columns) in shapes.items():
        for side, shape in (("A", (4, columns)), ("B", (rows, 4))):
            held[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] = torch.randn(shape) * 0.01
    save_file(held, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["kv_a_proj_with_mqa", "q_a_proj", "gate_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter, numbers


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_rows_that_are_no_multiple_of_a_block(tmp_path: Path, output_format: Any) -> None:
    base, adapter, numbers = deepseek(tmp_path)
    lorafold.merge(base, [adapter], tmp_path / "out", output_format=output_format)
    found, held, updates = whole(tmp_path / "out"), whole(base), updates_in(adapter)
    assert held["model.layers.0.self_attn.q_a_proj.weight_scale_inv"].shape == (2, 2)
    for name, weight in numbers.items():
        if output_format == "bf16":
            assert same_bits(found[name], correctly_rounded(torch.from_numpy(weight), updates[name], torch.bfloat16)), name
            continue
        scale = spread(held[f"{name}_scale_inv"].double().numpy(), weight.shape, (128, 128))
        noise = uniform(0, name, weight.size)
        expected = codes_of(wide(weight, updates[name]), scale, held[name].view(torch.uint8).numpy(), noise)
        assert np.array_equal(found[name].view(torch.uint8).numpy(), expected), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("torch_dtype") == "bfloat16"


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_fused_experts(tmp_path: Path, output_format: Any) -> None:
    """``gate_up_proj`` (E, 2 · inter, hidden) with ``gate_up_proj_scale_inv``: an adapter on the stack, as PEFT saves it."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, moe_intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    base = tmp_path / "base"
    base.mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(base)
    numbers = to_fp8(base, {stack: BLOCK}, weight_block_size=list(BLOCK))[stack]
    chosen = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about transformers' deprecations
        wrapped = peft.get_peft_model(model, chosen)
    layer = next(each for each in wrapped.modules() if isinstance(each, peft.tuners.lora.layer.ParamWrapper))
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "adapter")
    delta = layer.get_delta_weight("default").detach().double().numpy()
    lorafold.merge(base, [tmp_path / "adapter"], tmp_path / "out", output_format=output_format)
    found, held = whole(tmp_path / "out"), whole(base)
    sums = numbers + delta
    if output_format == "bf16":
        # PEFT adds up ΔW in float32, four products at most: within 2⁻²¹ of the largest of them before the one rounding
        assert found[stack].shape == numbers.shape
        assert np.abs(found[stack].double().numpy() - sums).max() <= np.abs(sums).max() * 2.0**-8
        assert (found[stack] == torch.from_numpy(sums).bfloat16()).double().mean() > 0.999
        return
    scale = spread(held[f"{stack}_scale_inv"].double().numpy(), numbers.shape, BLOCK)
    expected = codes_of(sums, scale, held[stack].view(torch.uint8).numpy(), uniform(0, stack, numbers.size))
    assert (found[stack].view(torch.uint8).numpy() == expected).mean() > 0.999
    assert all(raw(found[name]) == raw(held[name]) for name in held if name != stack)
    assert lorafold.verify(tmp_path / "out", base, [tmp_path / "adapter"]).ok


def test_the_command_line_takes_it(case: Fp8Llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorafold.cli.main import main

    for words in (
        ["merge", case.base, case.adapter, "-o", tmp_path / "out", "--output-format", "same"],
        ["plan", case.base, case.adapter],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        found = capsys.readouterr()
        if words[0] == "merge":
            assert caught.value.code == 0
            assert "merged into their codes" in found.out
        else:
            assert caught.value.code == 1
            assert "--output-format same" in found.err


def test_an_adapter_may_be_plain(tmp_path: Path) -> None:
    """One scale for the tensor, as ModelOpt writes it, with the file of its own beside a config.json that says nothing."""
    base, adapter = tmp_path / "base", plain_adapter(tmp_path / "adapter", modules=("q_proj",))
    base.mkdir()
    torch.manual_seed(1)
    held, numbers = {}, {}
    for i in (0, 1):
        name = f"model.layers.{i}.q_proj.weight"
        codes, scales = quantised(torch.randn(8, 8), (8, 8))
        held |= {name: codes, f"{name}_scale": scales.reshape(())}
        numbers[name] = stated(codes, scales, (8, 8))
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    (base / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": {"quant_algo": "FP8"}}))
    assert lorafold.inspect(base).details["quantisation"] == {"method": "FP8", "file": "hf_quant_config.json"}
    lorafold.merge(base, [adapter], tmp_path / "out", output_format="bf16")
    found, updates = whole(tmp_path / "out"), updates_in(adapter)
    assert updates.keys() == numbers.keys()
    for name, weight in numbers.items():
        assert same_bits(found[name], correctly_rounded(torch.from_numpy(weight), updates[name], torch.bfloat16))
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()

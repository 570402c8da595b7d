"""Rows 1 to 19: an adapter that does not fit, is damaged, or asks for what cannot be done."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import edit_json, expected, plain_adapter, rewritten, tensors

Q0 = "model.layers.0.q_proj"
A0, B0 = f"base_model.model.{Q0}.lora_A.weight", f"base_model.model.{Q0}.lora_B.weight"

SHARD = "model-00001-of-00002.safetensors"


def test_row_01_nothing_matches(road: Any) -> None:
    rewritten(road.adapter, road.folder / "other", rename=lambda name: name.replace(".layers.", ".blocks."))
    said = road.refused("none of the 4 adapter modules", "blocks.0.q_proj", Q0, adapters=(road.folder / "other",))
    assert said.count("did you mean") >= 3
    road.refused("none of the 4", options=("--allow", "partial"), adapters=(road.folder / "other",))


def test_row_02_some_do_not_match(road: Any) -> None:
    other = rewritten(road.adapter, road.folder / "other", rename=lambda name: name.replace("0.q_proj", "0.q_prj"))
    edit_json(other / "adapter_config.json", target_modules=["q_proj", "v_proj", "q_prj"])
    road.refused("1 of 4 adapter modules", "q_prj", f"did you mean {Q0}?", adapters=(other,))
    said = road.merge("--allow", "partial", adapters=(other,))
    assert "left out of other" in said
    assert road.receipt()["unmatched"] == ["model.layers.0.q_prj"]
    assert torch.equal(tensors(road.out)[f"{Q0}.weight"], tensors(road.base)[f"{Q0}.weight"])
    assert not torch.equal(tensors(road.out)[f"{Q0[:-6]}v_proj.weight"], tensors(road.base)[f"{Q0[:-6]}v_proj.weight"])
    assert road.run("verify", road.out, "--base", road.base, "--adapter", other)[0] == 0


@pytest.mark.parametrize(("lost", "left"), [(A0, "lora_B"), (B0, "lora_A")])
def test_row_03_half_a_pair(road: Any, lost: str, left: str) -> None:
    road.edit(**{lost: None})
    road.refused("adapter_model.safetensors", Q0, f"has {left} but no lora_{'A' if left.endswith('B') else 'B'}")


def test_row_04_the_base_lacks_a_layer(road: Any) -> None:
    held = load_file(road.adapter / "adapter_model.safetensors")
    road.edit(**{name.replace("layers.0", "layers.7"): held[name].clone() for name in (A0, B0)})
    road.refused("1 of 5 adapter modules", "model.layers.7.q_proj")


def test_row_05_target_modules_that_the_file_lacks(road: Any) -> None:
    road.config(target_modules=["q_proj", "v_proj", "gate_proj"])  # which this base has no module for: PEFT asks that one matches
    assert "target_modules names gate_proj, which the base has no module for" in road.merge()
    shutil.rmtree(road.out)
    road.config(target_modules=["q_proj", "v_proj", "norm", "gate_proj"])
    road.shard(**{"model.layers.0.gate_proj.weight": torch.ones(12, 8).bfloat16()})
    road.index(lambda weight_map: weight_map.update({"model.layers.0.gate_proj.weight": SHARD}))
    road.refused("holds nothing for 1 of the 4 target_modules", "gate_proj", "it holds q_proj, v_proj")
    road.config(target_modules=r".*\.(q_proj|v_proj|norm)")
    assert "target_modules covers modules of the base for which the adapter holds nothing" in road.merge()


def test_row_06_shapes_that_do_not_fit(road: Any) -> None:
    road.edit(**{A0: torch.zeros(2, 9)})
    road.refused(Q0, "lora_A [2, 9]", "lora_B [8, 2]", "is [8, 8] (BF16)")


def test_row_07_ranks_that_disagree(road: Any) -> None:
    road.edit(**{B0: torch.zeros(8, 3)})
    road.refused(Q0, "found [2, 8] and [8, 3]")
    road.edit(**{B0: torch.zeros(8, 2)})
    road.config(r=4)
    road.refused("adapter_config.json", "r says rank 4", "have rank 2")
    road.config(r=2, rank_pattern={"layers.0.q_proj": 3})
    road.refused("rank_pattern 'layers.0.q_proj' says rank 3", "have rank 2")


def test_row_08_only_the_transpose_fits(road: Any) -> None:
    road.shard(**{f"{Q0}.weight": torch.randn(8, 6).bfloat16()})
    road.edit(**{A0: torch.randn(2, 8), B0: torch.randn(6, 2)})
    road.refused(Q0, f"ΔW fits {Q0}.weight only transposed", "set fan_in_fan_out to true")
    road.config(fan_in_fan_out=True)
    assert "stored (in, out)" in road.merge()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "true", '"16"', "null", "[16]", "{}"])
def test_row_09_alpha_that_is_no_number(road: Any, text: str) -> None:
    config = road.adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', f'"lora_alpha": {text}'))
    road.refused("adapter_config.json", "lora_alpha", text.strip('"[]{}-') or "{}")


@pytest.mark.parametrize("r", [0, -1, 2.0, True, "2", None])
def test_row_10_ranks_that_are_none(road: Any, r: Any) -> None:
    road.config(r=r)
    road.refused("adapter_config.json", "r must be a positive integer")


def test_row_11_alpha_zero_and_negative(road: Any) -> None:
    road.config(lora_alpha=0)
    assert "the adapter does nothing" in road.merge()
    assert tensors(road.out).keys() == tensors(road.base).keys()
    road.config(lora_alpha=-4)
    assert "the adapter is negated" in road.merge("--overwrite")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_row_12_numbers_of_the_adapter_that_are_not_finite(road: Any, value: float) -> None:
    bad = torch.zeros(2, 8)
    bad[1, 3] = bad[1, 5] = value
    road.edit(**{A0: bad})
    road.refused("NonFiniteError", A0, "2 numbers", "the first at [1, 3]", str(value))
    road.edit(**{A0: torch.zeros(2, 8), "base_model.model.model.layers.0.norm.weight": torch.full((8,), value)})
    road.config(modules_to_save=["norm"])
    road.refused("layers.0.norm.weight", "8 numbers", "[0]")


def test_row_13_overflow(road: Any) -> None:
    road.shard(**{f"{Q0}.weight": torch.full((8, 8), 60000.0).half()})
    road.edit(**{A0: torch.ones(2, 8), B0: torch.full((8, 2), 5000.0)})
    road.refused(f"{Q0}.weight", "64 numbers", "after merging into F16", "[0, 0]", "--on-overflow clamp")
    said = road.merge("--on-overflow", "clamp")
    assert f"64 numbers in 1 tensor were beyond the largest of the dtype and were put to it, most of them in {Q0}" in said
    assert (road.receipt()["clamped"], road.receipt()["tensors"][f"{Q0}.weight"]["clamped"]) == (64, 64)
    assert (tensors(road.out)[f"{Q0}.weight"] == 65504).all()
    assert road.receipt()["on_overflow"] == "clamp"
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0
    road.shard(**{"model.layers.0.norm.weight": torch.full((8,), -1e30), f"{Q0}.weight": torch.zeros(8, 8)})
    road.refused("model.layers.0.norm.weight", "after rounding to F16", options=("--dtype", "float16", "--overwrite"))


def test_row_14_a_base_that_is_not_finite(road: Any) -> None:
    odd = torch.tensor([math.nan, math.inf] * 4).bfloat16()
    road.shard(**{"model.layers.0.norm.weight": odd})
    road.merge()  # not touched: the same bits
    assert torch.equal(tensors(road.out)["model.layers.0.norm.weight"].view(torch.int16), odd.view(torch.int16))
    weight = tensors(road.base)[f"{Q0}.weight"]
    weight[2, 3], weight[4, 4] = math.nan, math.inf
    road.shard(**{f"{Q0}.weight": weight})
    road.refused(f"{Q0}.weight", "2 numbers", "in the base", "[2, 3]", "nan", "--allow nonfinite-base", options=("--overwrite",))
    road.merge("--allow", "nonfinite-base", "--overwrite")
    merged = tensors(road.out)[f"{Q0}.weight"]
    assert merged.isnan().nonzero().tolist() == [[2, 3]]
    assert merged.isinf().nonzero().tolist() == [[4, 4]]
    from lorafold import LowRankUpdate

    held = load_file(road.adapter / "adapter_model.safetensors")
    clean = torch.where(weight.isfinite(), weight, torch.zeros_like(weight))
    wanted = expected({"w": clean}, {"w": [LowRankUpdate(held[A0], held[B0], 2.0)]}, {})["w"]
    assert torch.equal(merged[weight.isfinite()], wanted[weight.isfinite()])
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "VERA", "IA3", "ADALORA", "OFT", "PROMPT_TUNING", None])
def test_row_15_kinds_that_cannot_be_merged(road: Any, kind: Any) -> None:
    road.config(peft_type=kind)
    road.refused("adapter_config.json", "peft_type", str(kind or "null"))


@pytest.mark.parametrize("field", ["alora_invocation_tokens", "arrow_config"])
def test_row_15_variants_that_cannot_be_merged(road: Any, field: str) -> None:
    road.config(**{field: [1]})
    road.refused("adapter_config.json", field, "is not supported")


@pytest.mark.parametrize("field", ["use_bdlora", "use_qalora"])
def test_row_15_variants_that_are_merged_only_where_they_are_described(road: Any, field: str) -> None:
    road.config(**{field: [1]})
    road.refused("adapter_config.json", f"{field} must be")


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"rank_pattern": {"q_proj": 2}, "r": 2}, 2.0),
    ],
)
def test_row_16_fields_that_change_the_sum_are_honoured(road: Any, fields: Any, factor: float) -> None:
    road.config(**fields)
    road.merge()
    updates = road.receipt()["tensors"][f"{Q0}.weight"]["updates"]
    assert updates[0]["scaling"] == pytest.approx(factor, rel=1e-12)


def test_row_16_or_refused_by_name(road: Any) -> None:
    road.config(trainable_token_indices=[[0, 1]])
    road.refused("adapter_config.json", "trainable_token_indices")
    road.config(trainable_token_indices=None, layer_replication=[[0, 1]])
    road.refused("num_hidden_layers")  # which the base's configuration does not say, and replicating changes


def test_row_17_fields_that_nobody_knows(road: Any) -> None:
    road.config(lora_epsilon=0.5)
    road.refused("adapter_config.json", "the field 'lora_epsilon' is not known", "0.5")
    road.config(lora_epsilon=None)
    assert "the field 'lora_epsilon' of adapter_config.json is not known" in road.merge()


def test_row_18_patterns_that_would_never_end(road: Any) -> None:
    bomb = "(.*.*)*" * 8 + "!"
    road.config(rank_pattern={bomb: 2}, alpha_pattern={"((a*)*)*q_proj": 8}, target_modules=f"({bomb}|.*proj)")
    road.merge()
    assert road.receipt()["tensors"][f"{Q0}.weight"]["updates"][0]["scaling"] == 4.0
    road.config(rank_pattern={r"(q)\1": 2})
    road.refused("adapter_config.json", "rank_pattern", "back-reference")


def test_row_19_another_base(road: Any) -> None:
    edit_json(road.base / "config.json", _name_or_path="org/other")
    assert "was trained on 'org/tiny'; the base is org/other" in road.merge()
    road.refused("org/tiny", "org/other", options=("--strict-base", "--overwrite"))
    edit_json(road.base / "config.json", _name_or_path="mirror/tiny")
    road.merge("--strict-base", "--overwrite")


def test_row_54_keys_of_every_style(road: Any) -> None:
    styles = {
        "module": lambda name: "module." + name,
        "compiled": lambda name: "_orig_mod." + name,
        "named": lambda name: name.replace(".weight", ".default.weight"),
        "bare": lambda name: name.removeprefix("base_model.model."),
        "short": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    }
    road.merge()
    wanted = tensors(road.out)
    for style, rename in styles.items():
        rewritten(road.adapter, road.folder / style, rename=rename)
        road.merge("--overwrite", adapters=(road.folder / style,))
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors(road.out).items()), style


def test_row_59_weights_and_names_of_several(road: Any) -> None:
    road.refused("ADAPTER", "nan", "a finite number", adapters=(f"{road.adapter}@nan",), code=2)
    other = plain_adapter(road.folder / "b", seed=9)
    road.refused("are the same adapter", adapters=(road.adapter, other, road.adapter))
    road.merge(adapters=(f"{road.adapter}@0", f"{other}@-0.5"))
    scalings = [each["scaling"] for each in road.receipt()["tensors"][f"{Q0}.weight"]["updates"]]
    assert scalings == [0.0, -1.0]


def test_row_63_nothing_to_merge(road: Any) -> None:
    save_file({}, road.adapter / "adapter_model.safetensors")
    road.refused("adapter_model.safetensors", "holds no tensors")
    road.refused("ADAPTER", adapters=(), code=2)
    index = road.base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    road.refused("model.safetensors.index.json", "lists no tensors")
    for file in road.base.glob("*.safetensors*"):
        file.unlink()
    save_file({}, road.base / "model.safetensors")
    road.refused("base holds no tensors")


def test_row_2_how_many_modules_are_left_out_is_said_first(road: Any) -> None:
    """In the summary's second line, in the plan's, and among the first fields of the JSON."""
    road.edit(**{f"base_model.model.model.layers.7.q_proj.lora_{side}.weight": torch.ones(2, 8).view(shape) for side, shape in
                 (("A", (2, 8)), ("B", (8, 2)))})  # fmt: skip
    words = "  left out  1 of 5 modules of the adapters: the base has no place for them"
    assert road.merge("--allow", "partial").splitlines()[1] == words
    code, out, _ = road.run("plan", road.base, road.adapter, "--allow", "partial")
    assert code == 0
    assert out.splitlines()[1] == words
    report = json.loads(road.merge("--allow", "partial", "--overwrite", "--json"))
    assert report["left_out"] == {"modules": 1, "names": ["model.layers.7.q_proj"]}
    assert list(report).index("left_out") < list(report).index("tensors")

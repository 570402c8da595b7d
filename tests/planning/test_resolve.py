"""Names of the same model under other wrappings find their tensors; what fits nowhere, twice or only transposed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from lorafold.errors import AmbiguousNameError, CheckpointError, ShapeMismatchError, UnmatchedAdapterError
from models import copied, different, edit_json, edit_tensors, expected, plain_adapter, plain_base, rewritten, tensors


def wrapped(folder: Path, path: Path, rename: Callable[[str], str]) -> Path:
    """A checkpoint of one file with its tensors renamed."""
    path.mkdir()
    save_file({rename(name): tensor for name, tensor in tensors(folder).items()}, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return wrapped(plain_base(tmp_path / "sharded"), tmp_path / "base", lambda name: name)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


PEFT = "base_model.model."
WRAPPINGS: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "base without model.": (lambda n: n.removeprefix("model."), lambda n: n),
    "adapter without model.": (lambda n: n, lambda n: PEFT + n.removeprefix(PEFT + "model.")),
    "adapter without base_model.model.": (lambda n: n, lambda n: n.removeprefix(PEFT)),
    "adapter in module.": (lambda n: n, lambda n: n.replace(PEFT, PEFT + "module.")),
    "adapter around PEFT in module.": (lambda n: n, lambda n: "module." + n),
    "adapter in _orig_mod.": (lambda n: n, lambda n: n.replace(PEFT, PEFT + "_orig_mod.")),
    "adapter around PEFT in _orig_mod.": (lambda n: n, lambda n: "_orig_mod." + n),
    "base in module.": (lambda n: "module." + n, lambda n: n),
    "base is part of a larger model": (lambda n: "language_model." + n, lambda n: n),
    "the order of wrappers changed": (
        lambda n: n.replace("model.", "model.language_model.", 1),
        lambda n: n.replace(PEFT + "model.", PEFT + "language_model.model."),
    ),
    "adapter keeps its name": (lambda n: n, lambda n: n.replace(".weight", ".default.weight")),
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_other_wrappings_of_the_same_names_merge_to_the_same_numbers(
    tmp_path: Path, base: Path, adapter: Path, wrapping: str
) -> None:
    rename_base, rename_adapter = WRAPPINGS[wrapping]
    other, renamed = wrapped(base, tmp_path / "other", rename_base), rewritten(adapter, tmp_path / "renamed", rename=rename_adapter)
    lorafold.merge(base, [adapter], tmp_path / "plain")
    report = lorafold.merge(other, [renamed], tmp_path / "out")
    wanted = {rename_base(name): tensor for name, tensor in tensors(tmp_path / "plain").items()}
    assert different(tensors(tmp_path / "out"), wanted) == {}
    seen = any("rewritten" in note for note in report.plan.notes)
    assert seen or "around PEFT" in wrapping or wrapping in ("adapter without base_model.model.", "adapter keeps its name")


def test_a_larger_model_around_the_one_that_was_trained(tmp_path: Path, base: Path, adapter: Path) -> None:
    """A vision tower with names that end alike, but not in all places, is not in the way."""
    other = wrapped(base, tmp_path / "other", lambda name: "language_model." + name)
    edit_tensors(other, lambda held: held | {"vision_tower.model.layers.0.q_proj.weight": torch.ones(8, 8).bfloat16()})
    plan = lorafold.plan(other, [adapter])
    merged = {step.tensor for step in plan.steps if step.action == "merge"}
    assert merged == {f"language_model.model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("q_proj", "v_proj")}


@pytest.mark.parametrize("tower", ["vision_tower", "model.vision_tower", "vision_model", "vit"])
def test_a_tower_of_pictures_is_never_the_language_model(tmp_path: Path, base: Path, adapter: Path, tower: str) -> None:
    other = wrapped(base, tmp_path / "other", lambda name: "language_model." + name)
    renamed = rewritten(adapter, tmp_path / "renamed", rename=lambda name: name.replace(PEFT + "model.", f"{PEFT}{tower}."))
    with pytest.raises(UnmatchedAdapterError):
        lorafold.plan(other, [renamed])


def test_two_places_that_fit_are_ambiguous(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = wrapped(base, tmp_path / "other", lambda name: "draft." + name)
    edit_tensors(other, lambda held: held | {"main." + name: tensor for name, tensor in tensors(base).items()})
    with pytest.raises(AmbiguousNameError, match="fits 2 places") as caught:
        lorafold.plan(other, [adapter])
    assert "could be draft.model.layers.0.q_proj.weight" in str(caught.value)
    assert "could be main.model.layers.0.q_proj.weight" in str(caught.value)


def test_a_name_that_is_nearly_right_is_named_with_the_right_one(tmp_path: Path, base: Path, adapter: Path) -> None:
    wrong = rewritten(adapter, tmp_path / "wrong", rename=lambda name: name.replace("0.q_proj", "0.q_prj"), target_modules=None)
    with pytest.raises(UnmatchedAdapterError) as caught:
        lorafold.plan(base, [wrong])
    assert "1 of 4 adapter modules" in str(caught.value)
    assert "  model.layers.0.q_prj   (did you mean model.layers.0.q_proj?)" in str(caught.value)
    assert caught.value.unmatched == ("model.layers.0.q_prj",)


def test_an_adapter_of_another_model_is_shown_names_of_both(tmp_path: Path, base: Path, adapter: Path) -> None:
    wrong = rewritten(adapter, tmp_path / "wrong", rename=lambda name: name.replace("layers", "blocks.h"))
    with pytest.raises(UnmatchedAdapterError) as caught:
        lorafold.plan(base, [wrong])
    assert "none of the 4 adapter modules has a tensor" in str(caught.value)
    assert "model.blocks.h.0.q_proj" in str(caught.value)
    assert "which holds model.layers.0.norm.weight" in str(caught.value)


def test_a_weight_that_only_fits_turned_round_needs_a_word(tmp_path: Path, adapter: Path) -> None:
    base = plain_base(tmp_path / "base")
    for file in base.glob("*.safetensors"):
        held = load_file(file)
        save_file({n: torch.ones(8, 12).bfloat16() if "q_proj" in n else t for n, t in held.items()}, file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(
        (base / "model.safetensors.index.json").read_text().replace('"total_size": 544', '"total_size": 672')
    )
    edit_tensors(adapter, lambda held: {n: torch.ones(12, 2) if "q_proj.lora_B" in n else t for n, t in held.items()})
    with pytest.raises(ShapeMismatchError, match="only the transpose would fit") as caught:
        lorafold.plan(base, [adapter])
    assert "fan_in_fan_out" in str(caught.value)
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    plan = lorafold.plan(base, [adapter])
    assert {a.module for step in plan.steps for a in step.addends if a.transposed} == {f"model.layers.{i}.q_proj" for i in (0, 1)}
    assert any("fan_in_fan_out" in note for note in plan.notes)


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_weight_of_an_unknown_model_follows_the_flag_and_says_so(
    tmp_path: Path, base: Path, adapter: Path, flag: bool
) -> None:
    (base / "config.json").unlink()
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=flag)
    plan = lorafold.plan(base, [adapter])
    assert all(addend.transposed is flag for step in plan.steps for addend in step.addends)
    (note,) = (note for note in plan.notes if "square weight of an unknown model" in note)
    assert " and 3 more: " in note


def test_a_part_of_a_known_family_decides_over_the_flag(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", modules=("c_proj", "q_proj"))
    edit_json(base / "config.json", model_type="vision-encoder-decoder", decoder={"model_type": "gpt2"})
    adapter = plain_adapter(tmp_path / "adapter", modules=("c_proj", "q_proj"))
    plan = lorafold.plan(base, [adapter])
    turned = {step.tensor: step.addends[0].transposed for step in plan.steps if step.addends}
    assert turned == {f"model.layers.{i}.{m}.weight": m == "c_proj" for i in (0, 1) for m in ("c_proj", "q_proj")}


def test_a_quantised_base_is_called_so(tmp_path: Path, base: Path, adapter: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    packed = copied(base, tmp_path / "packed")
    edit_tensors(packed, lambda held: {n: torch.ones(32, 1, dtype=torch.uint8) if "proj" in n else t for n, t in held.items()})
    edit_json(packed / "config.json", **quantised)
    renamed = wrapped(base, tmp_path / "renamed", lambda name: name.replace("proj.weight", "proj.qweight"))
    edit_json(renamed / "config.json", quantization_config={"quant_method": "gptq"})
    for folder, method in ((packed, "bitsandbytes"), (renamed, "gptq")):
        with pytest.raises(CheckpointError, match=rf"is quantised \({method}\)") as caught:
            lorafold.plan(folder, [adapter])
        assert "merge into the unquantised base" in str(caught.value)
    edit_json(packed / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"q_proj.weight' is of type U8, expected one of BF16"):
        lorafold.plan(packed, [adapter])


def test_notes_escape_names_from_files(tmp_path: Path, base: Path, adapter: Path) -> None:
    def evil(name: str) -> str:
        return name.replace("q_proj", "q\x1b[31m_proj")

    other, renamed = (
        wrapped(base, tmp_path / "other", evil),
        rewritten(adapter, tmp_path / "renamed", rename=evil, target_modules=None),
    )
    (other / "config.json").unlink()
    notes = lorafold.plan(other, [renamed]).notes
    assert notes
    assert not any("\x1b" in note for note in notes)


def test_what_was_merged_is_what_was_meant(tmp_path: Path, base: Path, adapter: Path) -> None:
    held = load_file(adapter / "adapter_model.safetensors")
    updates = {
        f"model.layers.{i}.{m}.weight": [
            lorafold.LowRankUpdate(*(held[f"{PEFT}model.layers.{i}.{m}.lora_{x}.weight"] for x in "AB"), 2.0)
        ]
        for i in (0, 1)
        for m in ("q_proj", "v_proj")
    }
    lorafold.merge(base, [adapter], tmp_path / "out")
    assert different(tensors(tmp_path / "out"), expected(tensors(base), updates, {})) == {}

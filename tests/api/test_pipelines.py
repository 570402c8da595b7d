"""A diffusers pipeline merged as a whole: each component that an adapter changes, everything else byte for byte, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import lorafold
from diffusion import (
    CLIP,
    FLUX,
    added,
    as_diffusers,
    as_kohya,
    clip,
    files,
    flux,
    kohya,
    pairs,
    pipeline,
    quietly,
    unet,
    update,
    weights,
    write,
)
from lorafold import ReadOptions
from lorafold.cli.main import main
from lorafold.errors import (
    AlreadyMergedError,
    CheckpointError,
    NonFiniteError,
    OutputExistsError,
    PlanError,
    UnmatchedAdapterError,
    VerificationError,
)
from models import different, edit_json, plain_adapter, refused
from quantised import to_fp8


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("pipeline") / "base", second=True)


@pytest.fixture
def base(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "base"))


def test_components_are_merged_and_the_rest_copied(tmp_path, base):
    adapter = kohya(tmp_path / "one.safetensors")
    report = lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out")
    parts = update()
    wanted = added(weights(base / "unet"), parts["lora_unet"], 0.75)
    assert different(weights(tmp_path / "out" / "unet"), wanted) == {}
    text = {name.removeprefix("text_model."): factor for name, factor in parts["lora_te1"].items()}
    assert different(weights(tmp_path / "out" / "text_encoder"), added(weights(base / "text_encoder"), text, 0.75)) == {}
    before, after = files(base), files(tmp_path / "out")
    changed = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "README.md"}
    configs = {"unet/config.json", "text_encoder/config.json"}
    assert {name for name in before if before[name] != after.get(name)} - configs == changed | {"everything.safetensors"}
    assert all(json.loads(before[name]) == json.loads(after[name]) for name in configs)
    receipts = {"lorafold-pipeline.json", "unet/lorafold.json", "text_encoder/lorafold.json"}
    assert after.keys() == (before.keys() | receipts) - {"everything.safetensors"}
    assert report.proof is not None
    assert report.proof.failures == ()
    assert report.plan.count("merge") == len(parts["lora_unet"]) + len(text) == len(report.kept)
    card = after["README.md"].decode()
    assert "license: mit" in card
    assert "library_name: diffusers" in card
    assert "`one` at weight 0.5 folded into" in card


def test_what_was_written_loads(tmp_path, base):
    from diffusers import UNet2DConditionModel

    lorafold.merge(base, [kohya(tmp_path / "one.safetensors")], tmp_path / "out")
    model = quietly(lambda: UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet"))
    assert different(dict(model.state_dict()), added(weights(base / "unet"), update()["lora_unet"], 1.5)) == {}


def test_diffusers_and_kohya_keys_give_the_same_pipeline(tmp_path, base):
    parts = update()
    new = {"unet": parts["lora_unet"], "text_encoder": parts["lora_te1"]}
    held = as_diffusers(new)
    one = write(tmp_path / "one.safetensors", held)
    lorafold.merge(base, [(one, 1.5)], tmp_path / "one")
    lorafold.merge(base, [kohya(tmp_path / "two.safetensors")], tmp_path / "two")
    for name in ("unet", "text_encoder"):
        assert different(weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)) == {}


def test_second_text_encoders_and_transformers(tmp_path):
    """FLUX's second text encoder is kohya's third; an adapter without parts is for the transformer."""
    base = pipeline(tmp_path / "base", main="transformer", second=True)
    factors, text = pairs(flux(), FLUX), pairs(clip(), CLIP, seed=9)
    held = as_kohya({"lora_unet": factors, "lora_te3": text}, alpha=2.0)
    lorafold.merge(base, [write(tmp_path / "one.safetensors", held)], tmp_path / "out")
    assert different(weights(tmp_path / "out" / "transformer"), added(weights(base / "transformer"), factors, 1.0)) == {}
    assert different(weights(tmp_path / "out" / "text_encoder_2"), added(weights(base / "text_encoder_2"), text, 1.0)) == {}
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").read_bytes() == (
        base / "text_encoder" / "model.safetensors"
    ).read_bytes()


def test_the_second_transformer_of_wan(tmp_path):
    """Adapters for either are named alike; which is meant is said."""
    base = pipeline(tmp_path / "base", main="transformer", second=True)
    shutil.copytree(base / "transformer", base / "transformer_2")
    edit_json(base / "model_index.json", transformer_2=["diffusers", "FluxTransformer2DModel"])
    factors = pairs(flux(), FLUX)
    for held in (as_kohya({"lora_unet": factors}, alpha=2.0), as_diffusers({"transformer": factors})):
        adapter = write(tmp_path / "one.safetensors", held)
        for component, other in (("transformer_2", "transformer"), (None, "transformer_2")):
            lorafold.merge(base, [adapter], tmp_path / "out", read_options=ReadOptions(component=component), overwrite=True)
            changed = weights(tmp_path / "out" / (component or "transformer"))
            assert different(changed, added(weights(base / "transformer"), factors, 1.0)) == {}
            assert different(weights(tmp_path / "out" / other), weights(base / other)) == {}
        lorafold.verify(tmp_path / "out", base, [adapter], read_options=ReadOptions(component=component)).raise_for_failures()


def test_a_sharded_component_stays_one(tmp_path, made):
    base = tmp_path / "base"
    shutil.copytree(made, base)
    shutil.rmtree(base / "unet")
    quietly(lambda: unet().save_pretrained(base / "unet", max_shard_size="100KB"))
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert (base / "unet" / index).exists()
    lorafold.merge(base, [kohya(tmp_path / "one.safetensors")], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out" / "unet")) == sorted([*os.listdir(base / "unet"), "lorafold.json"])
    assert json.loads((tmp_path / "out" / "unet" / index).read_text()) == json.loads((base / "unet" / index).read_text())
    from diffusers import UNet2DConditionModel

    model = quietly(lambda: UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet"))
    assert different(dict(model.state_dict()), weights(tmp_path / "out" / "unet")) == {}


def test_verify(tmp_path, base, capsys):
    """Against base and adapters, and against the receipts; what was changed since is named."""
    adapter, out = kohya(tmp_path / "one.safetensors"), tmp_path / "out"
    lorafold.merge(base, [adapter], out)
    lorafold.verify(out, base, [adapter]).raise_for_failures()
    lorafold.verify(out).raise_for_failures()
    with pytest.raises(SystemExit) as left:
        main(["verify", str(out), "--base", str(base), "--adapter", str(adapter)])
    assert left.value.code == 0
    other = kohya(tmp_path / "two.safetensors", seed=3)
    assert any(failure.startswith("unet: ") for failure in lorafold.verify(out, base, [other]).failures)
    assert lorafold.verify(out, base, [(adapter, 0.5)]).failures
    alone = write(tmp_path / "three.safetensors", as_kohya({"lora_unet": update()["lora_unet"]}, alpha=3.0))
    assert any("nothing of the adapters given" in failure for failure in lorafold.verify(out, base, [alone]).failures)
    (out / "scheduler" / "scheduler_config.json").write_text('{"a": 1}')
    assert any("scheduler_config.json is not as it was written" in failure for failure in lorafold.verify(out).failures)
    (out / "scheduler" / "scheduler_config.json").unlink()
    assert any("scheduler_config.json is missing" in failure for failure in lorafold.verify(out, base, [adapter]).failures)
    data = bytearray((out / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(data)
    assert any(failure.startswith("unet: ") for failure in lorafold.verify(out).failures)
    capsys.readouterr()


def test_what_the_base_was_when_it_was_copied(tmp_path, base):
    adapter, out = kohya(tmp_path / "one.safetensors"), tmp_path / "out"
    lorafold.merge(base, [adapter], out)
    (base / "tokenizer" / "vocab.json").write_text('{"b": 1}')
    (base / "tokenizer" / "more.json").write_text("{}")
    failures = lorafold.verify(out, base, [adapter]).failures
    assert failures == ("tokenizer/more.json was not copied", "tokenizer/vocab.json is not what the base has")


def test_the_plan_shows_all_components(tmp_path, base, capsys):
    adapter = kohya(tmp_path / "one.safetensors")
    plan = lorafold.plan(base, [adapter])
    assert plan.count("merge") == sum(map(len, update().values()))
    assert {step.tensor.partition("/")[0] for step in plan.steps} == {"unet", "text_encoder"}
    assert all(name.endswith(".alpha") for name in plan.adapters[0].left_out)
    alone = lorafold.plan(base, [adapter], read_options=ReadOptions(component="unet")).adapters[0].left_out
    assert {why for name, why in alone.items() if name.startswith("lora_te1") and "alpha" not in name} == {"it is for lora_te1"}
    with pytest.raises(SystemExit) as left:
        main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--dry-run"])
    assert left.value.code == 0
    assert "unet/" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_several_adapters_and_one_component(tmp_path, base):
    one, two = kohya(tmp_path / "one.safetensors"), kohya(tmp_path / "two.safetensors", seed=5)
    text = {name.removeprefix("text_model."): f for name, f in update()["lora_te1"].items()}
    lorafold.merge(base, [one], tmp_path / "text", read_options=ReadOptions(component="text_encoder"))
    assert different(weights(tmp_path / "text" / "unet"), weights(base / "unet")) == {}
    assert different(weights(tmp_path / "text" / "text_encoder"), added(weights(base / "text_encoder"), text, 1.5)) == {}
    lorafold.merge(base, [one, (two, 2.0)], tmp_path / "both")
    lorafold.merge(base, [(two, 2.0), one], tmp_path / "turned")
    assert different(weights(tmp_path / "both" / "unet"), weights(tmp_path / "turned" / "unet")) == {}
    lorafold.verify(tmp_path / "both", base, [(two, 2.0), one]).raise_for_failures()


def test_an_adapter_that_names_no_part_is_for_the_main_model(tmp_path, base):
    """PEFT's folder, as a UNet saves it."""
    modules = [name for name in pairs(unet(), ("attn1.to_q",)) if "down_blocks" in name]
    adapter = plain_adapter(tmp_path / "one", modules=("to_q",), size=8)
    from safetensors.torch import save_file

    held = {
        f"base_model.model.{name}.lora_{side}.weight": torch.ones(2, 8) if side == "A" else torch.ones(8, 2)
        for name in modules
        for side in "AB"
    }
    save_file(held, adapter / "adapter_model.safetensors")
    plan = lorafold.plan(base, [adapter])
    assert {step.tensor for step in plan.steps if step.addends} == {f"unet/{name}.weight" for name in modules}


def test_an_adapter_that_names_no_part_is_for_the_one_that_is_said(tmp_path, base):
    modules = list(pairs(clip(), ("q_proj",)))
    adapter = plain_adapter(tmp_path / "one", modules=("q_proj",), size=16)
    held = as_diffusers({"base_model.model": {name: (torch.ones(2, 16), torch.ones(16, 2)) for name in modules}})
    write(adapter / "adapter_model.safetensors", held)
    options = ReadOptions(component="text_encoder_2")
    lorafold.merge(base, [adapter], tmp_path / "out", read_options=options)
    assert (tmp_path / "out" / "text_encoder_2" / "lorafold.json").exists()
    lorafold.verify(tmp_path / "out", base, [adapter], read_options=options).raise_for_failures()


def test_a_snapshot_in_a_hub_cache(tmp_path, base):
    """A folder of links to blobs; the output has files."""
    cache = tmp_path / "models--org--tiny"
    root = cache / "snapshots" / "1" / "x"
    (cache / "blobs").mkdir(parents=True)
    for i, (name, data) in enumerate(files(base).items()):
        (cache / "blobs" / f"{i:040x}").write_bytes(data)
        link = root.parent / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / "blobs" / f"{i:040x}", link.parent))
    adapter = kohya(tmp_path / "one.safetensors")
    lorafold.merge(root.parent, [adapter], tmp_path / "out")
    lorafold.merge(base, [adapter], tmp_path / "plain")
    found, wanted = files(tmp_path / "out"), files(tmp_path / "plain")
    assert {name for name in wanted if found.get(name) != wanted[name]} <= {
        "README.md", "lorafold-pipeline.json", "unet/lorafold.json", "text_encoder/lorafold.json"
    }  # fmt: skip
    assert 'base_model: "org/tiny"' in found["README.md"].decode()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_nothing_is_left_where_something_is_wrong(tmp_path, base):
    """Found before the first component is written, or in its writing: whole or not at all."""
    held = as_kohya(update(), alpha=3.0)
    stray = (
        held
        | {f"lora_te3_x.{part}.weight": torch.ones(2, 2) for part in ("lora_down", "lora_up")}
        | {"lora_te3_x.alpha": torch.tensor(1.0)}
    )
    wrong = write(tmp_path / "wrong.safetensors", stray)
    refused(base, [wrong], UnmatchedAdapterError, "lora_te3_x")
    other = {
        name.replace("lora_te1_text_model_encoder_layers_0", "lora_te1_text_model_encoder_layers_7"): t for name, t in held.items()
    }
    refused(base, [write(tmp_path / "other.safetensors", other)], UnmatchedAdapterError, "layers_7")
    name = next(name for name in held if name.startswith("lora_te1") and "up" in name)
    refused(base, [write(tmp_path / "nan.safetensors", held | {name: held[name] / 0})], NonFiniteError, name)
    good = kohya(tmp_path / "good.safetensors")
    refused(base, [good], PlanError, "an undo file restores a whole", undo=tmp_path / "undo", only_changed=True)
    weights = next((base / "unet").glob("*.safetensors"))
    expected = {f"unet/{weights.name}": "0" * 64}
    refused(base, [good], CheckpointError, "is not the file that was meant", expect_sha256=expected)
    expected[f"unet/{weights.name}"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    lorafold.merge(base, [good], tmp_path / "meant", expect_sha256=expected)
    (base / "vae" / "config.json").symlink_to("/etc/hostname")
    refused(base, [good], CheckpointError, "leaves its folder")


def test_a_part_without_component_may_be_left_out(tmp_path, base):
    held = as_kohya(update(), alpha=3.0)
    held |= {
        "lora_te3_x.lora_down.weight": torch.ones(2, 2),
        "lora_te3_x.lora_up.weight": torch.ones(2, 2),
        "lora_te3_x.alpha": torch.tensor(1.0),
    }
    shutil.rmtree(base / "text_encoder_2")
    adapter = write(tmp_path / "one.safetensors", held)
    report = lorafold.merge(base, [adapter], tmp_path / "out", allow_partial=True)
    assert report.plan.unmatched == ("lora_te3_x",)
    lorafold.verify(tmp_path / "out", base, [adapter]).raise_for_failures()


def test_merging_again(tmp_path, base):
    adapter, out = kohya(tmp_path / "one.safetensors"), tmp_path / "out"
    lorafold.merge(base, [adapter], out)
    with pytest.raises(OutputExistsError):
        lorafold.merge(base, [adapter], out)
    with pytest.raises(AlreadyMergedError):
        lorafold.merge(out, [adapter], tmp_path / "twice")
    lorafold.merge(out, [kohya(tmp_path / "two.safetensors", seed=4)], tmp_path / "second")
    lorafold.merge(base, [kohya(tmp_path / "two.safetensors", seed=4)], out, overwrite=True)
    lorafold.verify(out).raise_for_failures()


def test_lists_of_components_that_cannot_be(tmp_path, base):
    adapter = kohya(tmp_path / "one.safetensors")
    edit_json(base / "model_index.json", **{"../x": ["diffusers", "UNet2DConditionModel"]})
    refused(base, [adapter], CheckpointError, "no plain name")
    (base / "model_index.json").write_text("[]")
    refused(base, [adapter], CheckpointError, "must hold an object")
    (base / "model_index.json").write_text("{}")
    refused(base, [adapter], UnmatchedAdapterError, "it has no weights")


def test_receipts_that_cannot_be(tmp_path, base):
    lorafold.merge(base, [kohya(tmp_path / "one.safetensors")], tmp_path / "out")
    edit_json(tmp_path / "out" / "lorafold-pipeline.json", files={"../x": "0"})
    with pytest.raises(VerificationError, match="files must be"):
        lorafold.verify(tmp_path / "out")
    (tmp_path / "out" / "lorafold-pipeline.json").unlink()
    with pytest.raises(VerificationError, match=r"has no lorafold-pipeline\.json"):
        lorafold.verify(tmp_path / "out")


def test_each_adapter_alone_is_what_a_merge_of_it_writes(tmp_path, base):
    """A component is read once for all; none appears where one cannot."""
    one, two = kohya(tmp_path / "one.safetensors"), kohya(tmp_path / "two.safetensors")
    outs = tmp_path / "outs"
    outs.mkdir()
    reports = lorafold.merge_each(base, [one, (two, 0.5)], outs)
    assert [Path(report.out).name for report in reports] == ["one", "two"]
    for (path, weight), report in zip([(one, 1.0), (two, 0.5)], reports, strict=True):
        alone = lorafold.merge(base, [(path, weight)], tmp_path / f"alone-{path.stem}")
        assert set(alone.kept) == set(report.kept)
        for file in Path(alone.out).rglob("*"):
            if file.is_file() and file.name != "README.md":
                assert (Path(report.out) / file.relative_to(alone.out)).read_bytes() == file.read_bytes(), file
        assert not lorafold.verify(report.out, base, [(path, weight)]).failures
    with pytest.raises(lorafold.LorafoldError):
        lorafold.merge_each(
            base, [one, write(tmp_path / "three.safetensors", {"lora_te9_x.lora_up.weight": torch.ones(2, 2)})], outs
        )
    assert sorted(path.name for path in outs.iterdir()) == ["one", "two"]


def test_a_pipeline_is_not_held_to_a_base_that_is_one_model(tmp_path, base):
    adapter = kohya(tmp_path / "one.safetensors")
    lorafold.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is a pipeline, and .* is one model"):
        lorafold.verify(tmp_path / "out", base / "unet", [adapter])


@pytest.mark.parametrize("output_format", ["bf16", "same"])
def test_a_component_may_be_quantised(tmp_path, output_format):
    """The transformer in FP8, the text encoder in floats: the option is for the first, and the second stays as it is."""
    base = pipeline(tmp_path / "base", main="transformer", second=True)
    factors, text = pairs(flux(), FLUX), pairs(clip(), CLIP, seed=9)
    names = {f"{name}.weight": (8, 8) for name in factors}
    before = weights(base / "text_encoder_2")
    numbers = to_fp8(base / "transformer", names, weight_block_size=[8, 8])
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_unet": factors, "lora_te3": text}, alpha=2.0))
    with pytest.raises(CheckpointError, match="is quantised"):
        lorafold.merge(base, [adapter], tmp_path / "out")
    lorafold.merge(base, [adapter], tmp_path / "out", output_format=output_format)
    assert different(weights(tmp_path / "out" / "text_encoder_2"), added(before, text, 1.0)) == {}
    found = weights(tmp_path / "out" / "transformer")
    if output_format == "bf16":
        decoded = {name: torch.from_numpy(each) for name, each in numbers.items()}
        sums = added(decoded, factors, 1.0)
        assert all(torch.equal(found[name], sums[name].bfloat16()) for name in numbers)
        assert not [name for name in found if name.endswith("_scale_inv")]
    else:
        assert all(found[name].dtype == torch.float8_e4m3fn for name in numbers)
    assert lorafold.verify(tmp_path / "out", base, [adapter]).ok
    with pytest.raises(PlanError, match="is not quantised"):
        lorafold.plan(pipeline(tmp_path / "plain", main="transformer", second=True), [adapter], output_format="bf16")

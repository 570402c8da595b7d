"""A plan that was stored is carried out as it stands, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorafold
from diffusion import UNET, as_kohya, pairs, pipeline, unet, write
from lorafold.cli.main import main
from lorafold.errors import PlanError
from models import edit_tensors, plain_adapter, plain_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter")
    plain_adapter(tmp_path / "other", seed=8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(here: Path, capfd: pytest.CaptureFixture[str], *flags: str) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "base", "adapter@0.5", "other", "--json", *flags])
    assert ended.value.code == 0
    (here / "plan.json").write_text(capfd.readouterr().out)
    return here / "plan.json"


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_it_writes_what_the_merge_would(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = stored(here, capfd, "--dtype", "float16", "--rounding", "stochastic", "--seed", "5", "--max-shard-size", "300")
    report = lorafold.run(path, here / "run")
    assert report.proof is not None
    assert report.proof.ok
    lorafold.merge(
        "base", [("adapter", 0.5), "other"], here / "plain", dtype="float16", rounding="stochastic", seed=5, max_shard_size=300
    )
    assert weights(here / "run") == weights(here / "plain") != {}
    plan = lorafold.plan("base", ["adapter"])
    for number, each in enumerate((plan, plan.to_json(), json.loads(json.dumps(plan.to_json())))):
        assert lorafold.run(each, here / str(number), verify=False).plan == plan


def test_a_plan_of_a_pipeline(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    adapter = write(tmp_path / "a.safetensors", as_kohya({"lora_unet": pairs(unet(), UNET)}, alpha=3.0))
    plan = lorafold.plan(base, [adapter])
    assert lorafold.run(plan.to_json(), tmp_path / "run").plan == plan
    lorafold.merge(base, [adapter], tmp_path / "plain")
    assert weights(tmp_path / "run" / "unet") == weights(tmp_path / "plain" / "unet") != {}


def test_what_has_changed_since_is_named(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = stored(here, capfd)
    edit_tensors(here / "adapter", lambda held: {name: tensor * 2 for name, tensor in held.items()})
    with pytest.raises(PlanError, match=r"adapter has sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        lorafold.run(path, here / "out")
    path = stored(here, capfd)
    value = json.loads(path.read_text())
    next(step for step in value["shards"][0]["steps"] if step["addends"])["addends"][0]["scaling"] *= 2
    with pytest.raises(PlanError, match="comes about in another way"):
        lorafold.run(value, here / "out")
    with pytest.raises(PlanError, match="has the fingerprint"):
        lorafold.run(json.loads(path.read_text()) | {"fingerprint": "0" * 64}, here / "out")
    with pytest.raises(TypeError, match=r"run\(\) has no option 'dtype'"):  # the plan says it
        lorafold.run(path, here / "out", dtype="float32")
    assert not (here / "out").exists()


NONSENSE: list[Any] = [
    [], {}, 7, "plan", None, {"format": 2}, {"format": 1}, {"format": 1, "base": 3},
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_nonsense_is_no_plan(here: Path, value: Any) -> None:
    (here / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError):
        lorafold.run(here / "plan.json", here / "out")


@pytest.mark.parametrize("field", ["base", "fingerprint", "adapters", "options", "shards", "notes", "config", "unmatched"])
@pytest.mark.parametrize("value", [None, 3, "x", ["x"], [[]], {"a": 1}], ids=repr)
def test_a_field_of_nonsense_is_an_error_of_ours(here: Path, field: str, value: Any) -> None:
    plan = json.loads(json.dumps(lorafold.plan("base", ["adapter"]).to_json()))
    with pytest.raises(lorafold.LorafoldError):
        lorafold.run(plan | {field: value}, here / "out")
    assert not (here / "out").exists()


def test_a_file_that_is_not_there(here: Path) -> None:
    with pytest.raises(PlanError):
        lorafold.run(here / "none.json", here / "out")

"""Pipelines: undo files, getting the base back, and overlays of the tensors that changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import lorafold
from diffusion import files, kohya, pipeline, weights
from lorafold.cli.main import main
from lorafold.errors import CheckpointError, InputError, NonFiniteError, OutputError, OutputExistsError, VerificationError
from models import edit_json


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("pipeline") / "base", second=True)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return kohya(tmp_path / "one.safetensors")


def test_the_base_comes_back(tmp_path, made, adapter):
    """All of it; without the base all but its model card, and the file at the top that no merge copies."""
    report = lorafold.merge(made, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    assert report.undo == str(tmp_path / "undo")
    assert report.undo_bytes == sum(path.stat().st_size for path in (tmp_path / "undo").iterdir())
    lorafold.unmerge(tmp_path / "out", tmp_path / "one", base=made)
    lorafold.unmerge(tmp_path / "out", tmp_path / "two", undo=tmp_path / "undo")
    before = files(made)
    assert files(tmp_path / "one") == {name: data for name, data in before.items() if name != "everything.safetensors"}
    left = {"everything.safetensors", "README.md"}
    assert files(tmp_path / "two") == {name: data for name, data in before.items() if name not in left}


def test_one_component_comes_back(tmp_path, made, adapter):
    lorafold.merge(made, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    lorafold.unmerge(tmp_path / "out" / "unet", tmp_path / "one", base=made / "unet")
    lorafold.unmerge(tmp_path / "out" / "unet", tmp_path / "two", undo=tmp_path / "undo" / "unet.safetensors")
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(made / "unet")


def test_what_cannot_be_undone(tmp_path, made, adapter):
    base, out = Path(shutil.copytree(made, tmp_path / "base")), tmp_path / "out"
    lorafold.merge(base, [adapter], out, undo=tmp_path / "undo")
    lorafold.merge(base, [(adapter, 0.5)], tmp_path / "half", undo=tmp_path / "others")
    before = sorted(os.listdir(tmp_path))

    def refused(kind, match, **given):
        with pytest.raises(kind, match=match):
            lorafold.unmerge(out, tmp_path / "restored", **given)
        assert sorted(os.listdir(tmp_path)) == before

    refused(InputError, "cannot be restored from .* alone")
    refused(InputError, "one of them is enough", base=base, undo=tmp_path / "undo")
    refused(VerificationError, "is not the undo file of", undo=tmp_path / "others")
    refused(CheckpointError, "no such file", undo=tmp_path / "nowhere")
    refused(CheckpointError, "is one model", base=base / "unet")
    (base / "scheduler" / "scheduler_config.json").write_text('{"x": 1}')
    refused(VerificationError, "scheduler/scheduler_config.json is not what", base=base)
    (out / "scheduler" / "scheduler_config.json").write_text('{"x": 1}')
    refused(VerificationError, "scheduler/scheduler_config.json is not what", undo=tmp_path / "undo")
    edit_json(out / "lorafold-pipeline.json", left_out=["x"])
    refused(VerificationError, "lorafold-pipeline.json", undo=tmp_path / "undo")


def test_undo_folders_that_cannot_be(tmp_path, made, adapter):
    (tmp_path / "file").write_text("")
    for place, kind in (
        (tmp_path / "file", OutputExistsError),
        (tmp_path / "out" / "undo", OutputError),
        (tmp_path / "out", OutputError),
        (made / "undo", OutputError),
        (tmp_path / "no" / "where", OutputError),
    ):
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(kind):
            lorafold.merge(made, [adapter], tmp_path / "out", undo=place)
        assert sorted(os.listdir(tmp_path)) == before, place
    lorafold.merge(made, [adapter], tmp_path / "one", undo=tmp_path / "undo")
    with pytest.raises(OutputExistsError, match=r"unet.safetensors|text_encoder.safetensors"):
        lorafold.merge(made, [(adapter, 0.5)], tmp_path / "two", undo=tmp_path / "undo")
    assert not (tmp_path / "two").exists()
    lorafold.unmerge(tmp_path / "one", tmp_path / "restored", undo=tmp_path / "undo")


def test_no_undo_file_is_left_without_its_output(tmp_path, made, adapter, monkeypatch):
    import lorafold.api.pipelines.beside as room

    def damaged(source: Path, target: Path) -> str:
        raise NonFiniteError("a number is damaged")

    monkeypatch.setattr(room, "copy_proven", damaged)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NonFiniteError):
        lorafold.merge(made, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / "undo").mkdir()
    (tmp_path / "undo" / "mine.txt").write_text("kept")
    with pytest.raises(NonFiniteError):
        lorafold.merge(made, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    assert os.listdir(tmp_path / "undo") == ["mine.txt"]


def test_only_what_changed(tmp_path, made, adapter, capsys):
    whole = lorafold.merge(made, [adapter], tmp_path / "whole")
    lorafold.merge(made, [adapter], tmp_path / "out", only_changed=True)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kinds = {name for name in found if not name.endswith(".safetensors")}
    assert kinds == {"lorafold-pipeline.json", "README.md", "unet/lorafold.json", "text_encoder/lorafold.json"}
    changed = {f"{name}/{tensor}" for name in ("unet", "text_encoder") for tensor in weights(tmp_path / "out" / name)}
    assert changed == set(whole.kept)
    for name in ("unet", "text_encoder"):
        full = weights(tmp_path / "whole" / name)
        assert all(tensor.equal(full[key]) for key, tensor in weights(tmp_path / "out" / name).items())
    assert lorafold.verify(tmp_path / "out").ok
    assert lorafold.verify(tmp_path / "out", made, [adapter]).ok
    assert not lorafold.verify(tmp_path / "out", made, [(adapter, 0.5)]).ok
    with pytest.raises(InputError, match="holds only the tensors that a merge changed"):
        lorafold.unmerge(tmp_path / "out", tmp_path / "restored", base=made)
    with pytest.raises(SystemExit) as done:
        main(["merge", str(made), str(adapter), "-o", str(tmp_path / "cli"), "--only-changed"])
    assert done.value.code == 0
    assert "verified" in capsys.readouterr().out


def test_each_adapter_may_go_on_too(tmp_path, made, adapter, monkeypatch):
    import lorafold.api.pipelines.beside as room

    two, outs = kohya(tmp_path / "two.safetensors", seed=5), tmp_path / "outs"
    outs.mkdir()

    def stop(source: Path, target: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "copy_proven", stop)
        with pytest.raises(KeyboardInterrupt):
            lorafold.merge_each(made, [adapter, two], outs)
    reports = lorafold.merge_each(made, [adapter, two], outs)
    assert all(any("went on" in note for note in report.notes) for report in reports)
    for report, one in zip(reports, (adapter, two), strict=True):
        lorafold.merge(made, [one], tmp_path / f"alone-{one.stem}")
        assert files(Path(report.out)) == files(tmp_path / f"alone-{one.stem}")
    assert sorted(os.listdir(outs)) == ["one", "two"]

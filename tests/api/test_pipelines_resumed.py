"""A pipeline whose merge was stopped: the same call goes on with its components and files, and makes the same bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorafold
from diffusion import files, kohya, pipeline
from lorafold.errors import NonFiniteError, OutputError, PlanError
from models import edit_json


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return pipeline(tmp_path_factory.mktemp("pipeline") / "base", second=True)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return kohya(tmp_path / "one.safetensors")


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def stopped(monkeypatch: pytest.MonkeyPatch, where: str, name: str, fault: type[BaseException], after: int) -> Callable[..., Any]:
    """Let the function `name` of the module `where` raise at its call number `after`; a merge that is stopped by it."""

    def run(base: Path, adapter: Path, out: Path, **options: Any) -> None:
        import importlib

        room = importlib.import_module(where)
        true, count = getattr(room, name), iter(range(9999))

        def fails(*args: Any, **kwargs: Any) -> Any:
            if next(count) == after:
                raise fault("stopped")
            return true(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(room, name, fails)
            with pytest.raises(fault):
                lorafold.merge(base, [adapter], out, **options)

    return run


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("room", "name", "after"),
    [
        ("lorafold.api.pipelines.beside", "copy_proven", 0),
        ("lorafold.api.pipelines.beside", "copy_proven", 3),
        ("lorafold.engine.merge_outputs", "make_receipt", 0),
        ("lorafold.engine.merge_outputs", "make_receipt", 1),
        ("lorafold.api.pipelines.staged", "journal_finished", 1),
    ],
)
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OutputError])
def test_the_same_call_goes_on(tmp_path, made, adapter, monkeypatch, room, name, after, fault, verify):
    lorafold.merge(made, [adapter], tmp_path / "whole", verify=verify)
    stopped(monkeypatch, room, name, fault, after)(made, adapter, tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()
    assert len(hidden(tmp_path)) == 1
    report = lorafold.merge(made, [adapter], tmp_path / "out", verify=verify)
    assert any("went on where a run was stopped" in note for note in report.notes)
    assert hidden(tmp_path) == []
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (report.proof is not None) == verify
    again = lorafold.merge(made, [adapter], tmp_path / "third", verify=verify)
    assert report.kept == again.kept
    assert report.nbytes == again.nbytes
    lorafold.verify(tmp_path / "out", made, [adapter]).raise_for_failures()


def test_nothing_is_kept_of_a_run_that_finished_nothing(tmp_path, made, adapter, monkeypatch):
    stopped(monkeypatch, "lorafold.engine.merge_outputs", "run", KeyboardInterrupt, 0)(made, adapter, tmp_path / "out")
    assert hidden(tmp_path) == []


def test_nothing_is_kept_where_the_numbers_are_wrong(tmp_path, made, adapter, monkeypatch):
    stopped(monkeypatch, "lorafold.engine.merge_outputs", "make_receipt", NonFiniteError, 1)(made, adapter, tmp_path / "out")
    assert hidden(tmp_path) == []


def test_another_merge_to_the_same_output_is_refused(tmp_path, made, adapter, monkeypatch):
    stop = stopped(monkeypatch, "lorafold.api.pipelines.beside", "copy_proven", KeyboardInterrupt, 0)
    stop(made, adapter, tmp_path / "out")
    with pytest.raises(PlanError, match=r"holds finished files of another merge to the same output, which differs in .*rounding"):
        lorafold.merge(made, [adapter], tmp_path / "out", rounding="stochastic", seed=1)
    other = Path(shutil.copytree(made, tmp_path / "other"))
    with pytest.raises(PlanError, match="base file"):
        lorafold.merge(other, [adapter], tmp_path / "out")
    report = lorafold.merge(other, [adapter], tmp_path / "out", restart=True)
    assert not any("went on" in note for note in report.notes)
    lorafold.verify(tmp_path / "out", other, [adapter]).raise_for_failures()


@pytest.mark.parametrize("what", ["weights", "receipt", "gone"])
def test_a_component_that_changed_meanwhile_is_made_again(tmp_path, made, adapter, monkeypatch, what):
    stopped(monkeypatch, "lorafold.api.pipelines.beside", "copy_proven", KeyboardInterrupt, 0)(made, adapter, tmp_path / "out")
    unet = next(tmp_path.glob(".out*")) / "unet"
    if what == "weights":
        file = next(unet.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif what == "receipt":
        edit_json(unet / "lorafold.json", created="never")
    else:
        shutil.rmtree(unet)
    report = lorafold.merge(made, [adapter], tmp_path / "out")
    assert "unet, finished by a run that was stopped, has changed since: made again" in report.notes
    lorafold.verify(tmp_path / "out", made, [adapter]).raise_for_failures()


def test_linked_files_are_known_again(tmp_path, made, adapter, monkeypatch):
    base = Path(shutil.copytree(made, tmp_path / "base"))
    whole = lorafold.merge(base, [adapter], tmp_path / "whole", link=True)
    stop = stopped(monkeypatch, "lorafold.api.pipelines.beside", "copy_proven", KeyboardInterrupt, 0)
    stop(base, adapter, tmp_path / "out", link=True)
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert sorted(report.linked) == sorted(whole.linked)


def test_undo_files_stay_with_what_is_kept(tmp_path, made, adapter, monkeypatch):
    undo = tmp_path / "undo"
    stop = stopped(monkeypatch, "lorafold.api.pipelines.beside", "copy_proven", KeyboardInterrupt, 0)
    stop(made, adapter, tmp_path / "out", undo=undo)
    assert sorted(os.listdir(undo)) == ["text_encoder.safetensors", "unet.safetensors"]
    (undo / "unet.safetensors").unlink()
    report = lorafold.merge(made, [adapter], tmp_path / "out", undo=undo)
    assert any(note.startswith("unet, finished by a run") for note in report.notes)
    lorafold.unmerge(tmp_path / "out", tmp_path / "restored", undo=undo)
    assert files(tmp_path / "restored").items() <= files(made).items()

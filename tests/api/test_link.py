"""Whole files that are the base's: linked with --link, cloned where the file system can; the output is the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorafold
from diffusion import UNET, as_kohya, pairs, pipeline, unet, write
from lorafold.cli.main import main
from lorafold.engine.write import run
from lorafold.errors import CheckpointError, OutputError, PlanError
from lorafold.files.atomic.durable import clone_file, link_file
from models import edit_json, llama, save_adapter, save_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("link")
    base = save_base(llama(layers=4), folder / "base", max_shard_size="10KB")
    return base, save_adapter(llama(layers=4), folder / "adapter", target_modules=["q_proj"], layers_to_transform=[1])


@pytest.fixture
def road(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Base and adapter, on the same file system as the output."""
    return Path(shutil.copytree(made[0], tmp_path / "base")), Path(shutil.copytree(made[1], tmp_path / "adapter"))


def same_files(base: Path, out: Path) -> set[str]:
    """The names of files that are one and the same in both."""
    return {path.name for path in out.iterdir() if (base / path.name).exists() and path.samefile(base / path.name)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize("verify", [True, False])
def test_untouched_files_are_linked_and_the_output_is_the_same(tmp_path: Path, road: Any, verify: bool) -> None:
    base, adapter = road
    before = contents(base)
    plain = lorafold.merge(base, [adapter], tmp_path / "plain", verify=verify)
    report = lorafold.merge(base, [adapter], tmp_path / "out", verify=verify, link=True)
    touched = {s.name for s in report.plan.shards if any(step.action != "copy" for step in s.steps)}
    untouched = {path.name for path in base.glob("*.safetensors")} - touched
    assert touched
    assert len(untouched) > 3
    assert same_files(base, tmp_path / "out") == set(report.linked) == untouched
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")  # receipt and index too
    assert plain.linked == ()
    assert same_files(base, tmp_path / "plain") == set()
    shutil.rmtree(tmp_path / "out")
    assert contents(base) == before


def test_a_linked_output_verifies_and_gives_its_base_back(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "out", link=True, verify=False, undo=tmp_path / "undo")
    assert same_files(base, tmp_path / "out")
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()
    lorafold.unmerge(tmp_path / "out", tmp_path / "one", undo=tmp_path / "undo")
    lorafold.unmerge(tmp_path / "out", tmp_path / "two", base=base)
    for restored in (tmp_path / "one", tmp_path / "two"):
        assert same_files(base, restored) == set()
        assert all((restored / path.name).read_bytes() == path.read_bytes() for path in base.glob("*.safetensors*"))


@pytest.mark.parametrize("change", ["dtype", "max_shard_size", "metadata", "only_changed"])
def test_a_file_that_would_have_other_bytes_is_not_linked(tmp_path: Path, road: Any, change: str) -> None:
    base, adapter = road
    given: dict[str, dict[str, Any]] = {
        "dtype": {"dtype": "F32"},
        "max_shard_size": {"max_shard_size": 10**6},
        "metadata": {},
        "only_changed": {"only_changed": True},
    }
    if change == "metadata":
        for file in base.glob("*.safetensors"):  # the same bytes but for one field, which a merge does not take over
            file.write_bytes(file.read_bytes().replace(b'{"__metadata__":{"format":"pt"}', b'{"__metadata__":{"format":"np"}', 1))
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True, **given[change])
    assert report.linked == ()
    assert same_files(base, tmp_path / "out") == set()
    assert any("nothing was linked" in note for note in report.notes)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_there_are_no_links_files_are_copied(tmp_path: Path, road: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "plain")
    monkeypatch.setattr(os, "link", _refused(number))
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert report.linked == ()
    assert sum(f"could not be linked ({os.strerror(number)})" in note for note in report.notes) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_row_44_no_room_for_a_link_is_an_error(tmp_path: Path, road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = road
    monkeypatch.setattr(os, "link", _refused(errno.ENOSPC))
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_row_26_a_base_that_changes_meanwhile_is_refused(tmp_path: Path, road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = road
    real = os.link

    def replacing(source: Any, target: Any) -> None:
        old = Path(source).read_bytes()
        os.unlink(source)
        Path(source).write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        real(source, target)

    monkeypatch.setattr(os, "link", replacing)
    with pytest.raises(CheckpointError, match="changed"):
        lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_row_49_only_link_replaces_what_shares_files_with_the_base(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    before = contents(base)
    lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    with pytest.raises(OutputError, match="is a file of the input") as caught:
        lorafold.merge(base, [adapter], tmp_path / "out", overwrite=True)
    assert "link=True" in str(caught.value.hint)
    report = lorafold.merge(base, [(adapter, 0.5)], tmp_path / "out", overwrite=True, link=True)
    assert same_files(base, tmp_path / "out") == set(report.linked)
    assert contents(base) == before
    with pytest.raises(OutputError, match="it is the input"):
        lorafold.merge(base, [adapter], base, overwrite=True, link=True)


def test_row_49_a_base_that_links_into_the_output_is_not_lost(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    file = next(path for path in base.glob("*.safetensors") if path.samefile(tmp_path / "out" / path.name))
    os.link(file, tmp_path / "third")  # so that the file has two names in any case
    file.unlink()
    file.symlink_to(tmp_path / "out" / file.name)
    with pytest.raises((OutputError, CheckpointError)):
        lorafold.merge(base, [adapter], tmp_path / "out", link=True, overwrite=True)
    assert file.exists()


def test_row_42_a_stopped_merge_goes_on_with_its_links(tmp_path: Path, road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = road
    before = contents(base)
    names = sorted(path.name for path in base.glob("*.safetensors"))

    def stopped(*args: Any, **kwargs: Any) -> Any:
        run(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lorafold.engine.merge_outputs.run", stopped)
        with pytest.raises(KeyboardInterrupt):
            lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    (hidden,) = tmp_path.glob(".out.lorafold-*")
    assert same_files(base, hidden)
    with pytest.raises(PlanError, match="link"):  # the copies that were asked for would not be copies
        lorafold.merge(base, [adapter], tmp_path / "out")
    monkeypatch.delattr(os, "link")  # not needed again
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert f"{len(names)} of {len(names)} files were finished" in report.notes[0]
    assert same_files(base, tmp_path / "out") == set(report.linked)
    assert report.linked
    assert contents(base) == before


def test_each_links_the_same_files(tmp_path: Path, road: Any) -> None:
    base, adapter = road
    shutil.copytree(adapter, tmp_path / "second")
    edit_json(tmp_path / "second" / "adapter_config.json", lora_alpha=1)
    (tmp_path / "out").mkdir()
    reports = lorafold.merge_each(base, [adapter, tmp_path / "second"], tmp_path / "out", link=True)
    for report in reports:
        assert same_files(base, Path(report.out)) == set(report.linked)
        assert len(report.linked) > 3


def test_a_pipeline_links_the_weights_that_it_copies(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base", second=True)
    adapter = write(tmp_path / "one.safetensors", as_kohya({"lora_unet": pairs(unet(), UNET, seed=1)}, alpha=3.0))
    lorafold.merge(base, [adapter], tmp_path / "plain")
    report = lorafold.merge(base, [adapter], tmp_path / "out", link=True)
    assert report.linked
    for name in report.linked:
        assert (tmp_path / "out" / name).samefile(base / name)
    weights = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert weights - set(report.linked) == {"unet/diffusion_pytorch_model.safetensors"}
    for path in (tmp_path / "plain").rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (tmp_path / "out" / path.relative_to(tmp_path / "plain")).read_bytes() == path.read_bytes()
    assert lorafold.verify(tmp_path / "out").failures == ()
    assert f"linked    {len(report.linked)} files, the base's own" in str(report)


def _cloning(calls: list[str]) -> Any:
    """What FICLONE does, as far as can be seen."""

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        calls.append(Path(os.readlink(f"/proc/self/fd/{target}")).name)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return 0

    return ioctl


@pytest.mark.parametrize("verify", [True, False])
def test_where_files_can_be_cloned_whole_ones_are(tmp_path: Path, road: Any, verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = road
    lorafold.merge(base, [adapter], tmp_path / "plain", verify=verify)
    linked = lorafold.merge(base, [adapter], tmp_path / "linked", link=True).linked
    calls: list[str] = []
    monkeypatch.setattr(fcntl, "ioctl", _cloning(calls))
    report = lorafold.merge(base, [adapter], tmp_path / "out", verify=verify)
    assert sorted(calls) == sorted(linked)
    assert report.linked == ()
    assert same_files(base, tmp_path / "out") == set()
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    monkeypatch.setattr(os, "link", _refused(errno.EPERM))  # then a clone is the next best
    calls.clear()
    lorafold.merge(base, [adapter], tmp_path / "other", verify=verify, link=True)
    assert sorted(calls) == sorted(linked)
    assert contents(tmp_path / "other") == contents(tmp_path / "plain")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSPC])
def test_a_clone_that_is_refused_leaves_nothing(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(fcntl, "ioctl", _refused(number))
    if number == errno.ENOSPC:
        with pytest.raises(OutputError, match=os.strerror(number)):
            clone_file(tmp_path / "source", tmp_path / "target")
    else:
        fault = clone_file(tmp_path / "source", tmp_path / "target")
        assert fault is not None
        assert fault.errno == number
    assert not (tmp_path / "target").exists()


def _refused(number: int) -> Any:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused


def test_on_the_command_line(tmp_path: Path, road: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = road
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--link", "--json"])
    assert set(json.loads(capsys.readouterr().out)["linked"]) == same_files(base, tmp_path / "out") != set()
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--link", "--overwrite"])
    assert "the base's own" in capsys.readouterr().out


def test_a_link_is_of_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "name").symlink_to("blob")
    assert link_file(tmp_path / "name", tmp_path / "other") is None
    assert not (tmp_path / "other").is_symlink()
    assert (tmp_path / "other").samefile(tmp_path / "blob")
    with pytest.raises(OutputError, match="File exists"):
        link_file(tmp_path / "name", tmp_path / "other")
    with pytest.raises(CheckpointError, match="no such file"):
        link_file(tmp_path / "nothing", tmp_path / "third")

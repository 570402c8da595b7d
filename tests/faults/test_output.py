"""Rows 42 to 52 and 62: whatever happens to the run or its disk, the output is whole or not there, and the work is not lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.engine import outputs as writing
from lorafold.engine.sources import Sources
from lorafold.files.atomic import journal
from lorafold.files.atomic.folder import StagedFolder
from models import different, plain_adapter, plain_base, tensors

SHARD, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q0 = "model.layers.0.q_proj.weight"


def hidden(road: Any) -> list[Path]:
    return sorted(path for path in road.folder.iterdir() if path.name.startswith(".out.lorafold-"))


def stop_after_one_file(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the next merge raise `error` when one of its two files is finished."""
    real = journal.journal_finished

    def stopping(folder: Path, entry: Any) -> None:
        real(folder, entry)
        monkeypatch.setattr(writing, "journal_finished", real)
        raise error

    monkeypatch.setattr(writing, "journal_finished", stopping)


def written_files(road: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files of weights that the merges after this write, as a list that grows."""
    run = sys.modules["lorafold.engine.write"]  # the function has the same name
    names: list[str] = []
    real = run.ShardWriter

    def counting(path: Path, *args: Any, **kwargs: Any) -> Any:
        names.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(run, "ShardWriter", counting)
    return names


KILLED = """
import os, signal, sys
from lorafold.engine import outputs as writing
from lorafold.cli import main
real = writing.journal_finished
def deadly(folder, entry):
    real(folder, entry)
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
writing.journal_finished = deadly
main(sys.argv[2:])
"""


def killed(road: Any, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, name, "merge", road.base, road.adapter, "-o", road.out, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_row_42_killed_the_same_command_goes_on(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    road.merge()
    wanted = tensors(road.out)
    shutil.rmtree(road.out)
    assert killed(road, "SIGKILL").returncode == -signal.SIGKILL
    assert not road.out.exists()
    assert len(hidden(road)) == 1
    names = written_files(road, monkeypatch)
    said = road.merge()
    assert "went on where a run was stopped: 1 of 2 files were finished" in said
    assert names == [SECOND]
    assert different(tensors(road.out), wanted) == {}
    assert hidden(road) == []
    assert sorted(os.listdir(road.out)) == sorted(
        ["README.md", "config.json", "lorafold.json", SHARD, SECOND, "model.safetensors.index.json"]
    )
    assert road.receipt()["kept"] == pytest.approx(1, abs=0.1)
    assert len(road.receipt()["files"]) == 2
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


@pytest.mark.parametrize("verify", [True, False])
def test_row_42_what_was_not_proven_is_proven_when_it_goes_on(road: Any, verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_one_file(monkeypatch, SystemExit(143))
    code, _, _ = road.run("merge", road.base, road.adapter, "-o", road.out, "--no-verify")
    assert code == 143
    assert len(hidden(road)) == 1
    said = road.merge(*(() if verify else ("--no-verify",)))
    assert ("6 of 6 tensors proven" in said) is verify
    assert road.run("verify", road.out)[0] == (0 if verify else 3)  # without proving there are no hashes
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


def test_row_43_everything_is_on_disk_before_it_is_in_place(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b))[1])
    road.merge()
    at = steps.index("rename")
    before = [Path(each) for each in steps[:at]]
    assert {path.name for path in before} >= set(os.listdir(road.out))
    assert before[-1].name.startswith(".out.lorafold-")  # the folder itself, after its last entry changed
    assert steps[at + 1 :] == [str(road.folder)]
    names = [path.name for path in before]
    assert (
        max(names.index(name) for name in (SHARD, SECOND))
        < names.index("model.safetensors.index.json")
        < names.index("lorafold.json")
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "posix_fallocate"])
def test_row_44_the_disk_refuses(road: Any, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(os, call)
    calls = 0

    def refused(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if call == "rename" or calls > 3 or call == "posix_fallocate":
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, refused)
    code, _, err = road.run("merge", road.base, road.adapter, "-o", road.out)
    assert code == 1
    assert os.strerror(number) in err
    assert not road.out.exists()
    for folder in hidden(road):  # what is left is finished, and said to be
        assert str(folder) in err
        assert "the same command goes on" in err
        assert set(os.listdir(folder)) <= {journal.JOURNAL_NAME, SHARD, SECOND}
    monkeypatch.setattr(os, call, real)
    road.merge()
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


def test_row_44_too_little_space_is_seen_before_anything_is_written(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def full(path: Any) -> Any:
        values = list(real(path))
        values[4] = 0  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    road.refused("needed 544 bytes, free 0", "free some space")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_row_45_told_to_stop(road: Any, name: str, code: int) -> None:
    done = killed(road, name)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not road.out.exists()
    (left,) = hidden(road)
    assert f"kept in {left}; the same command goes on from there" in done.stderr
    assert f"to go on, run again:\n  lorafold merge {road.base} {road.adapter} -o {road.out}\n" in done.stderr
    assert SHARD in os.listdir(left)
    assert "went on where a run was stopped" in road.merge()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--dtype", "float32"), "dtype (was None, is 'F32')"),
        (("--rounding", "stochastic"), "rounding (was 'nearest', is 'stochastic')"),
        (("--precision", "fast"), "precision (was 'exact', is 'fast')"),
        (("--max-shard-size", "400"), "max_shard_size (was None, is 400)"),
        (("weight",), "adapter adapter"),
        (("adapter",), "adapter adapter"),
        (("alpha",), "adapter adapter"),
        (("base",), f"base file {SHARD}"),
    ],
)
def test_row_46_going_on_with_another_merge(
    road: Any, options: tuple[str, ...], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after_one_file(monkeypatch, KeyboardInterrupt())
    assert road.run("merge", road.base, road.adapter, "-o", road.out)[0] == 130
    adapters = (road.adapter,)
    if options == ("weight",):
        adapters = (f"{road.adapter}@0.5",)
    elif options == ("adapter",):
        road.edit(**{f"base_model.model.{Q0[:-7]}.lora_A.weight": torch.ones(2, 8)})
    elif options == ("alpha",):
        road.config(lora_alpha=5)
    elif options == ("base",):  # the same header, other numbers
        road.shard(**{Q0: torch.ones(8, 8).bfloat16()})
    chosen = options if options[0].startswith("--") else ()
    road.refused("finished files of another merge to the same output", field, "--restart", options=chosen, adapters=adapters)
    assert len(hidden(road)) == 1
    road.merge(*chosen, "--restart", adapters=adapters)
    assert hidden(road) == []


@pytest.mark.parametrize("damage", ["flipped", "shorter", "gone", "journal"])
def test_row_47_a_finished_file_that_was_damaged(road: Any, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after_one_file(monkeypatch, KeyboardInterrupt())
    road.run("merge", road.base, road.adapter, "-o", road.out)
    (left,) = hidden(road)
    file = left / SHARD
    if damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 4
        file.write_bytes(data)
    elif damage == "shorter":
        os.truncate(file, 10)
    elif damage == "gone":
        file.unlink()
    else:
        os.truncate(left / journal.JOURNAL_NAME, (left / journal.JOURNAL_NAME).stat().st_size - 1)
    names = written_files(road, monkeypatch)
    said = road.merge()
    assert names == [SHARD, SECOND]
    assert ("has changed since: made again" in said) is (damage != "journal")
    assert road.run("verify", road.out, "--base", road.base, "--adapter", road.adapter)[0] == 0


def test_row_48_an_output_that_exists(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    road.merge()
    old = (road.out / SHARD).read_bytes()
    road.refused("exists and is not empty", "--overwrite")
    road.config(lora_alpha=8)
    seen = []
    commit = StagedFolder.commit

    def looking(self: StagedFolder) -> None:
        seen.append((road.out / SHARD).read_bytes())
        commit(self)

    monkeypatch.setattr(StagedFolder, "commit", looking)
    road.merge("--overwrite")
    assert seen == [old]
    assert (road.out / SHARD).read_bytes() != old
    (road.folder / "mine").mkdir()
    (road.folder / "mine" / "thesis.tex").touch()
    code, _, err = road.run("merge", road.base, road.adapter, "-o", road.folder / "mine", "--overwrite")
    assert (code, os.listdir(road.folder / "mine")) == (1, ["thesis.tex"]), err


def test_row_49_the_base_is_never_the_output(road: Any) -> None:
    before = {path.name: path.read_bytes() for path in road.base.iterdir()}
    (road.folder / "link").symlink_to("base")
    for out in (road.base, road.base / "out", road.folder / "link", road.folder / "link" / ".." / "base", road.adapter):
        code, _, err = road.run("merge", road.base, road.adapter, "-o", out, "--overwrite")
        assert code == 1
        assert "cannot be the output" in err
    hard = road.folder / "hard"
    hard.mkdir()
    os.link(road.base / SHARD, hard / SHARD)
    code, _, err = road.run("merge", road.base, road.adapter, "-o", hard, "--overwrite")
    assert code == 1
    assert f"its {SHARD} is a file of the input" in err
    assert {path.name: path.read_bytes() for path in road.base.iterdir()} == before


def test_row_50_two_merges_to_one_output(road: Any) -> None:
    with StagedFolder(road.out):
        road.refused("another merge is writing to", f"process {os.getpid()} on ")
    road.merge()


def test_row_51_modes_and_permissions(road: Any) -> None:
    for file in road.base.iterdir():
        file.chmod(0o400)
    road.base.chmod(0o500)
    old = os.umask(0o027)
    try:
        road.merge()
    finally:
        os.umask(old)
        road.base.chmod(0o700)
    assert {stat.S_IMODE(file.stat().st_mode) for file in road.out.iterdir()} == {0o640}
    assert stat.S_IMODE(road.out.stat().st_mode) == 0o750
    code, _, err = road.run("merge", road.base, road.adapter, "-o", "/proc/out")
    assert code == 1
    assert "/proc/out cannot be written" in err


def test_row_62_names_times_and_tongues(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = plain_base(road.folder / "Zoë's base (1)" / ("长" * 40) / ("d" * 200))
    adapter = plain_adapter(road.folder / "adapter with spaces-é")
    for file in base.iterdir():
        os.utime(file, (4e9, 4e9))  # in 2096
    out = road.folder / ("输出 " * 20)
    code, _, err = road.run("merge", base, adapter, "-o", out)
    assert (code, err) == (0, "")
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:backslashreplace"}
    command = [sys.executable, "-m", "lorafold", "verify", out, "--base", base, "--adapter", adapter]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_journal_ends_where_it_was_cut(tmp_path: Path) -> None:
    journal.begin_journal(tmp_path, {"a": 1})
    for i in range(3):
        journal.journal_finished(tmp_path, journal.Finished(f"f{i}", hashlib.sha256().hexdigest(), True, {"t": (0.5, 1.0)}))
    file = tmp_path / journal.JOURNAL_NAME
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        found = journal.read_journal(tmp_path)
        lines = whole[:length].count(b"\n")
        assert len(found.finished if found is not None else ()) == max(0, lines - 1)
        assert (found is None) is (lines == 0 and length < whole.index(b"\n"))
    for junk in (b"[]\n", b"\xff\n", b"null\n", b""):
        file.write_bytes(junk)
        assert journal.read_journal(tmp_path) is None
    file.write_bytes(json.dumps({"a": 1}).encode() + b'\n{"name": "../x", "sha256": "", "proven": true, "kept": {}}\n')
    found = journal.read_journal(tmp_path)
    assert found is not None
    assert found.finished == {}


def test_row_25_a_base_that_shrinks_while_it_is_merged(road: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sources.start

    def truncating(self: Sources, *args: Any) -> Any:
        os.truncate(road.base / SHARD, 500)
        return real(self, *args)

    monkeypatch.setattr(Sources, "start", truncating)
    road.refused(SHARD, "was truncated while it was read: it ends at byte 500, expected 568")

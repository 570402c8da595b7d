"""An output appears whole or not at all, whatever fails and whenever the process is killed."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorafold.errors import OutputError, OutputExistsError
from lorafold.files.atomic import folder as stagedfolder
from lorafold.files.atomic.durable import write_text
from lorafold.files.atomic.folder import StagedFolder


def fill(out: Path, text: str, **options: Any) -> StagedFolder:
    """Write a folder as a merge does: a file, a file in a folder, and the config."""
    with StagedFolder(out, **options) as staged:
        write_text(staged.path / "config.json", text)
        (staged.path / "sub").mkdir()
        write_text(staged.path / "sub" / "more", text)
        assert staged.path.parent == out.resolve().parent
        staged.commit()
        assert staged.path == out.resolve()
    return staged


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"config.json": text, "sub/more": text}


def beside(out: Path) -> list[str]:
    return sorted(os.listdir(out.parent))


def test_appears_by_commit_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedFolder(out) as staged:
        write_text(staged.path / "a", "x")
        assert not out.exists()
        assert staged.path.name.startswith(".out.lorafold-")
    assert beside(out) == []
    assert fill(out, "1").notes == ()
    assert content(out) == whole("1")
    assert beside(out) == ["out"]


def test_row_51_the_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        fill(tmp_path / "out", "1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "config.json").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, GeneratorExit])
def test_row_45_leaving_by_any_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with pytest.raises(error), StagedFolder(out) as staged:  # noqa: PT012
        write_text(staged.path / "a", "x")
        raise error
    assert beside(out) == []


def test_an_empty_folder_is_replaced_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "1")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    fill(tmp_path / "link", "2")
    assert content(tmp_path / "disk" / "out") == whole("2")
    assert (tmp_path / "link").is_symlink()


def test_row_48_an_existing_checkpoint_stays_until_the_new_one_is_in_its_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "1")
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        fill(out, "2")
    with StagedFolder(out, overwrite=True) as staged:
        write_text(staged.path / "config.json", "2")
        assert content(out) == whole("1")
    assert content(out) == whole("1")
    fill(out, "2", overwrite=True)
    assert content(out) == whole("2")
    assert beside(out) == ["out"]


def test_row_48_without_an_atomic_swap_the_old_one_moves_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stagedfolder, "exchange", lambda *_: False)
    out = tmp_path / "out"
    fill(out, "1")
    fill(out, "2", overwrite=True)
    assert content(out) == whole("2")
    assert beside(out) == ["out"]
    real, calls = os.rename, []

    def third_refused(src: Any, dst: Any) -> None:
        calls.append(dst)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        real(src, dst)

    monkeypatch.setattr(os, "rename", third_refused)
    with pytest.raises(OutputError, match="Input/output error"):
        fill(out, "3", overwrite=True)
    assert content(out) == whole("2")
    assert beside(out) == ["out"]


def test_row_48_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), StagedFolder(out) as staged:  # noqa: PT012
        out.mkdir()
        (out / "config.json").write_text("another's")
        staged.commit()
    assert content(out) == {"config.json": "another's"}
    assert beside(out) == ["out"]


def test_row_49_an_input_is_never_the_output(tmp_path: Path) -> None:
    fill(tmp_path / "base", "1")
    for out in (tmp_path / "base", tmp_path / "base" / "out"):
        with pytest.raises(OutputError, match="cannot be the output"):
            fill(out, "2", overwrite=True, inputs=[tmp_path / "base"])
    assert content(tmp_path / "base") == whole("1")


def test_row_50_a_second_merge_to_the_same_output_fails_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedFolder(out) as staged:
        with pytest.raises(OutputError, match=rf"another merge is writing to .*out: process {os.getpid()} on "):
            fill(out, "2")
        fill(tmp_path / "other", "2")  # another output is no concern
        fill(tmp_path / "out.lorafold-1", "2")
        write_text(staged.path / "config.json", "1")
        staged.commit()
    assert (out / "config.json").read_text() == "1"


def test_row_50_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    program = """
import os, sys
from lorafold.files.atomic.folder import StagedFolder
from lorafold.files.atomic.durable import write_text
from lorafold.errors import OutputError
children = []
gate, opened = os.pipe()
for number in range(8):
    if (pid := os.fork()) == 0:
        os.close(opened)
        os.read(gate, 1)
        try:
            with StagedFolder(sys.argv[1]) as staged:
                write_text(staged.path / "config.json", str(number))
                sys.stdin.read()  # until all have tried
                staged.commit()
        except OutputError as error:
            os._exit(1 if "another merge" in str(error) else 2)
        os._exit(0)
    children.append(pid)
os.close(opened)
codes = []
while len(codes) < 7:
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
print(sorted(codes), flush=True)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "[1, 1, 1, 1, 1, 1, 1]\n"
        assert run.communicate()[0] == "0\n"
    assert beside(tmp_path / "out") == ["out"]


def test_row_43_everything_is_on_disk_before_the_rename_and_the_rename_before_commit_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(fd: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def recording_rename(src: Any, dst: Any) -> None:
        steps.append("rename")
        rename(src, dst)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    with StagedFolder(out) as staged:
        hidden = staged.path
        (hidden / "config.json").write_text("x")  # by someone who does not sync
        (hidden / "sub").mkdir()
        (hidden / "sub" / "more").write_text("x")
        steps.clear()
        staged.commit()
    at = steps.index("rename")
    assert {str(hidden / name) for name in ("config.json", "sub", "sub/more")} | {str(hidden)} <= set(steps[:at])
    assert steps[at - 1] == str(hidden)  # after its last entry was removed
    assert steps[at + 1 :] == [str(tmp_path)]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "unlink"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_row_44_a_refusal_of_any_call_is_typed_and_leaves_the_old_state(
    tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    out = tmp_path / "out"
    real = getattr(os, call)
    armed = {"at": call == "mkdir"}

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        return refused() if armed["at"] else real(*args, **kwargs)

    monkeypatch.setattr(os, call, sometimes)
    with pytest.raises(OutputError, match=os.strerror(number)), StagedFolder(out) as staged:  # noqa: PT012
        write_text(staged.path / "config.json", "1")
        armed["at"] = True
        try:
            staged.commit()
        finally:
            armed["at"] = False
    armed["at"] = False
    assert beside(out) == []
    fill(out, "2")


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="null"):
        StagedFolder("a\0b")
    for out in (tmp_path / "none" / "out", Path("/")):
        with pytest.raises(OutputError), StagedFolder(out):
            pass
    with pytest.raises(OutputError, match="File name too long"), StagedFolder(tmp_path / ("n" * 256)):
        pass
    with pytest.raises(OutputError, match="was not entered"):
        StagedFolder(tmp_path / "out").commit()


@pytest.mark.parametrize("name", ["n" * 255, "模" * 85, "Zoë's model (1)", "a\nb", ".hidden", "-o"])
def test_row_62_names_of_every_kind(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path(name), "1")
    leftover = Path(f"{stagedfolder.hidden_prefix(Path(name))}12-0123abcd")
    leftover.mkdir()
    assert len(fill(Path(name), "2", overwrite=True).notes) == 1
    assert os.listdir(tmp_path) == [name]
    assert content(Path(name)) == whole("2")


def test_row_42_left_overs_of_this_output_alone_are_removed(tmp_path: Path) -> None:
    ours = [tmp_path / f".out.lorafold-{n}-0123abcd" for n in (1, 99999999)] + [tmp_path / ".out.lorafold-old-0123abcd"]
    fill(tmp_path / "out", "1")
    others = [
        tmp_path / name for name in (".out.lorafold-x", ".out2.lorafold-1-0123abcd", ".out.lorafold-1-0123abcd.lorafold-1-0123abcd")
    ]
    for folder in ours + others:
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / ".out.lorafold-2-0123abcd").symlink_to("out2")
    notes = fill(tmp_path / "out", "2", overwrite=True).notes
    assert len(notes) == 3
    assert all("left by a run that was killed" in note for note in notes)
    assert not any(folder.exists() for folder in ours)
    assert all((folder / "file").exists() for folder in others)


KILLED = '''
"""Kill a run before or after each of its system calls in turn; after each, print what is at the output, and run again."""
import os, signal, sys
from pathlib import Path
from lorafold.files.atomic import folder as stagedfolder
from lorafold.files.atomic.folder import StagedFolder
from lorafold.files.atomic.durable import write_text
from lorafold.errors import OutputExistsError

root, swap = Path(sys.argv[1]), sys.argv[2]
if swap == "no-swap":
    stagedfolder.exchange = lambda *_: False

def fill(out, text, overwrite):
    with StagedFolder(out, overwrite=overwrite) as staged:
        write_text(staged.path / "config.json", text)
        (staged.path / "sub").mkdir()
        write_text(staged.path / "sub" / "more", text)
        staged.commit()
    return staged

def arm(at, after):
    calls = 0
    def deadly(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir", "open", "close"):
        setattr(os, name, deadly(getattr(os, name)))
    stagedfolder.exchange = deadly(stagedfolder.exchange)

def state(out):
    files = ("config.json", "sub/more")
    if not out.exists():
        return "absent"
    texts = {(out / name).read_text() if (out / name).exists() else None for name in files}
    return texts.pop() if len(texts) == 1 else "mixed"

for old in (None, "old"):
    for after in (False, True):
        at, alive = 0, False
        while not alive:
            at += 1
            out = root / f"{old}-{after}-{at}" / "out"
            out.parent.mkdir()
            if old:
                fill(out, "old", False)
            if (pid := os.fork()) == 0:
                arm(at, after)
                fill(out, "new", bool(old))
                os._exit(0)
            alive = os.waitpid(pid, 0)[1] == 0
            seen = state(out)
            try:
                fill(out, "again", False)
                restored = "absent"
            except OutputExistsError:
                restored = state(out)
            fill(out, "again", True)
            print(old, alive, seen, restored, state(out), *sorted(os.listdir(out.parent)))
'''


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["swap", "no-swap"])
def test_row_42_killed_before_or_after_any_call(tmp_path: Path, swap: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, swap], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 80  # two instants for each call
    for old, alive, seen, restored, final, *left in lines:
        assert (final, left) == ("again", ["out"])
        if alive == "True":
            assert seen == "new"
        elif old == "None":
            assert seen in ("absent", "new")
        elif swap == "swap":
            assert seen in ("old", "new")
        else:
            assert seen in ("old", "new", "absent")
        # without an atomic swap there is an instant with nothing at the output; the next run puts the old one back
        assert restored in (("old", "new") if old == "old" else ("absent", "new"))
    seen_in_all = {seen for _, _, seen, *_ in lines}
    assert seen_in_all >= {"absent", "old", "new"}


def test_row_42_killed_by_the_system_before_it_is_in_place(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from lorafold.files.atomic.folder import StagedFolder
with StagedFolder(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], timeout=120)
    assert done.returncode == -9
    assert [name[:14] for name in beside(tmp_path / "out")] == [".out.lorafold-"]
    assert len(fill(tmp_path / "out", "1").notes) == 1
    assert beside(tmp_path / "out") == ["out"]

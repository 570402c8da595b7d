"""Several outputs of one command that is killed between two appearances: run again, it makes the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lorafold
from diffusion import UNET, as_kohya, pairs, pipeline, unet, write
from lorafold.errors import OutputExistsError
from models import plain_adapter, plain_base

KILLED = """
import os, signal, sys
import lorafold
from lorafold.files.atomic.folder import StagedFolder

commit, left = StagedFolder.commit, int(sys.argv[1])

def commit_or_die(self):
    global left
    if ".components" not in str(self.out):
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    commit(self)

StagedFolder.commit = commit_or_die
lorafold.merge_each(sys.argv[2], sys.argv[4:], sys.argv[3])
"""


def killed(after: int, base: Path, adapters: list[Path], outs: Path) -> None:
    """Merge each, and die by SIGKILL when `after` of the outputs are in their places."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(after), base, outs, *adapters], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(params=["model", "pipeline"])
def road(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Path], Path]:
    (tmp_path / "outs").mkdir()
    if request.param == "model":
        adapters = [plain_adapter(tmp_path / name, seed=i) for i, name in enumerate(("one", "two", "three"))]
        return plain_base(tmp_path / "base"), adapters, tmp_path / "outs"
    parts = [as_kohya({"lora_unet": pairs(unet(), UNET, seed=i)}, alpha=3.0) for i in range(3)]
    adapters = [write(tmp_path / f"{name}.safetensors", part) for name, part in zip(("one", "two", "three"), parts, strict=True)]
    return pipeline(tmp_path / "base"), adapters, tmp_path / "outs"


def test_it_goes_on(road: Any, tmp_path: Path) -> None:
    """Killed twice, when one was there and when two were."""
    base, adapters, outs = road
    (tmp_path / "whole").mkdir()
    wanted = lorafold.merge_each(base, adapters, tmp_path / "whole")
    killed(1, base, adapters, outs)
    assert [path.name for path in outs.iterdir() if not path.name.startswith(".")] == ["one"]
    before = files(outs / "one")
    killed(1, base, adapters, outs)
    assert sorted(path.name for path in outs.iterdir() if not path.name.startswith(".")) == ["one", "two"]
    reports = lorafold.merge_each(base, adapters, outs)
    assert sorted(os.listdir(outs)) == ["one", "three", "two"]
    assert files(outs / "one") == before
    assert files(outs) == files(tmp_path / "whole")
    for report, other in zip(reports, wanted, strict=True):
        assert (Path(report.out).name, report.kept, report.nbytes) == (Path(other.out).name, other.kept, other.nbytes)
        assert report.proof is not None
        assert report.proof.ok
        assert report.to_json().keys() == other.to_json().keys()
    assert ["in its place already" in str(report) for report in reports] == [True, True, False]


@pytest.mark.parametrize("change", ["adapter", "output", "options"])
def test_what_is_there_of_another_command_or_damaged_is_in_the_way(tmp_path: Path, change: str) -> None:
    (tmp_path / "outs").mkdir()
    base, adapters = plain_base(tmp_path / "base"), [plain_adapter(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    killed(1, base, adapters, tmp_path / "outs")
    options: dict[str, Any] = {}
    if change == "adapter":
        lorafold.merge(base, [(adapters[0], 0.5)], tmp_path / "outs" / "a", overwrite=True)
    elif change == "output":
        file = tmp_path / "outs" / "a" / "model-00001-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    else:
        options = {"dtype": "F32", "restart": True}
    before = files(tmp_path / "outs" / "a")
    with pytest.raises(OutputExistsError):
        lorafold.merge_each(base, adapters, tmp_path / "outs", **options)
    assert files(tmp_path / "outs" / "a") == before
    lorafold.merge_each(base, adapters, tmp_path / "outs", overwrite=True, restart=True)
    assert lorafold.verify(tmp_path / "outs" / "a", base, [adapters[0]]).ok

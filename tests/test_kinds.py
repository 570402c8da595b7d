"""The benchmark of all kinds: that it measures what it says, at a size where that takes seconds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kinds
    import kinds_made
    import measuring

    return kinds, kinds_made, measuring


def test_two_rows(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["--size", "tiny", "--runs", "1", "--settle", "0", "--kinds", "plain,rows", "--ways", "exact", "--no-theirs"]
    command = [sys.executable, BENCHMARKS / "kinds.py", *words, "--data", tmp_path / "data", "--json", figures]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cp, plain, rows = json.loads(figures.read_text())["rows"]
    assert [(row["kind"], row["way"]) for row in (cp, plain, rows)] == [("cp -r", ""), ("plain", "exact"), ("rows", "exact")]
    weights = sum(path.stat().st_size for path in (tmp_path / "data" / "tiny-base").glob("*.safetensors"))
    assert cp["bytes"] == weights
    for row in (plain, rows):
        assert abs(row["bytes"] - weights) < 10_000, "the weights, but for what the header says"
        assert row["seconds"] == row["times"][0] > 0
        assert row["stopped_after"] is None
        assert row["failed"] == ""
    assert rows["by_plain"] == pytest.approx(rows["seconds"] / rows["bytes"] / (plain["seconds"] / plain["bytes"]))
    assert "trained token rows beside" in done.stdout
    assert not list((tmp_path / "data").glob("*kinds-output*"))


def test_a_row_that_takes_too_long_is_stopped(scripts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kinds, _, measuring = scripts
    with pytest.raises(measuring.TooLongError, match=r"more than 0\.2 s"):
        measuring.measured([sys.executable, "-c", "import time; time.sleep(60)"], limit=0.2)
    slow = kinds.Contender("plain", "exact", "lorafold", [], (), stopped=True)
    copy = kinds.Contender("cp -r", "", "cp", [], ())
    kinds.show(kinds.table([copy, slow], 60.0))
    assert "> 60 s" in capsys.readouterr().out


def test_each_kind_is_made(scripts: Any) -> None:
    kinds, made, _ = scripts
    assert kinds.KINDS.keys() == made.ADAPTERS.keys()
    assert {kind.base for kind in kinds.KINDS.values()} == {"llama", *made._BLOCKS, *made.QUANTISED}
    for base in made._BLOCKS:
        count = sum(map(math.prod, made.sizes(base, "0.3b").values())) * (4 if base == "groups" else 1)
        assert 0.9 < count / made.parameters("0.3b") < 1.1, base


def test_a_name_that_there_is_not_is_refused(scripts: Any) -> None:
    kinds, _, _ = scripts
    with pytest.raises(SystemExit, match="'dorra' is none of plain, "):
        kinds.rows_wanted("dorra", None)

"""The adapter option `map`, OLD=NEW: names that nothing else would match, and what such a rule must not do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import lorafold
from lorafold.adapters.read_options import ReadOptions
from lorafold.cli.app import app
from lorafold.errors import AdapterError, InputError, UnmatchedAdapterError
from models import different, plain_adapter, plain_base, refused, rewritten, tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter")


@pytest.fixture
def strange(tmp_path: Path, adapter: Path) -> Path:
    """The adapter with names that no table has."""

    def rename(name: str) -> str:
        return name.replace("model.layers.", "trunk.stage.").replace("q_proj", "wq.inner").replace("v_proj", "wv")

    return rewritten(adapter, tmp_path / "strange", rename=rename, target_modules=None)


RENAMES = (("trunk.stage", "model.layers"), ("wq.inner", "q_proj"), ("wv", "v_proj"))


def test_names_that_nobody_foresaw(tmp_path: Path, base: Path, adapter: Path, strange: Path) -> None:
    refused(base, [strange], UnmatchedAdapterError)
    lorafold.merge(base, [adapter], tmp_path / "plain")
    report = lorafold.merge(base, [strange], tmp_path / "out", read_options=ReadOptions(renames=RENAMES))
    assert different(tensors(tmp_path / "out"), tensors(tmp_path / "plain")) == {}
    assert "strange: trunk.stage.0.wq.inner and 3 more renamed as `ReadOptions(renames=…)` says" in report.plan.notes
    assert not lorafold.verify(tmp_path / "out", base, [strange], read_options=ReadOptions(renames=RENAMES)).failures


def test_on_the_command_line(tmp_path: Path, base: Path, strange: Path) -> None:
    flags = [word for old, new in RENAMES for word in ("--adapter-option", f"map={old}={new}")]
    for words in (
        ["plan", str(base), str(strange), *flags],
        ["merge", str(base), str(strange), "-o", str(tmp_path / "out"), *flags],
        ["verify", str(tmp_path / "out"), "--base", str(base), "--adapter", str(strange), *flags],
    ):
        assert CliRunner().invoke(app, words).exit_code == 0
    assert CliRunner().invoke(app, ["plan", str(base), str(strange), "--adapter-option", "map=nothing"]).exit_code == 2


def test_a_star_is_carried_over_and_a_caret_is_the_front(tmp_path: Path, base: Path, adapter: Path) -> None:
    strange = rewritten(
        adapter,
        tmp_path / "strange",
        rename=lambda name: name.replace("model.layers.", "trunk.").replace("_proj", ""),
        target_modules=None,
    )
    rules = (("^trunk.*.q", "model.layers.*.q_proj"), ("^trunk.*.v", "model.layers.*.v_proj"))
    plan = lorafold.plan(base, [strange], read_options=ReadOptions(renames=rules))
    assert plan.count("merge") == 4


def test_a_rule_that_fits_nothing_is_named(base: Path, adapter: Path) -> None:
    error = refused(
        base,
        [adapter],
        InputError,
        "renames=(('modle.layers', 'h'),))` fits no name",
        read_options=ReadOptions(renames=(("modle.layers", "h"),)),
    )
    assert "model.layers.0.q_proj.weight" in str(error)


def test_a_rule_may_be_for_one_of_several_adapters(tmp_path: Path, base: Path, strange: Path) -> None:
    other = plain_adapter(tmp_path / "other", seed=11)
    lorafold.plan(base, [strange, other], read_options=ReadOptions(renames=RENAMES))


def test_two_names_that_become_one_are_refused(base: Path, adapter: Path) -> None:
    options = ReadOptions(renames=(("q_proj", "v_proj"),))
    refused(base, [adapter], AdapterError, "`ReadOptions(renames=…)` makes", "the same", read_options=options)

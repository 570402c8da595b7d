"""What callers are told beside what verbs return: warnings once, at their own line, and lines in a log."""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold
from diffusion import UNET, as_kohya, pairs, pipeline, unet, write
from lorafold import LorafoldWarning
from lorafold.cli.main import main
from models import edit_tensors, plain_adapter, plain_base


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, and an adapter that is too small for its grid."""
    plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", lambda held: {name: tensor * 0.01 for name, tensor in held.items()})
    (tmp_path / "each").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model() -> torch.nn.Module:
    held = torch.nn.ModuleDict({"model": torch.nn.Module()})
    held["model"].layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({name: torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for name in ("q_proj", "v_proj")})
        for _ in range(2)
    )
    return held


CALLS: dict[str, Callable[[], Any]] = {
    "merge": lambda: lorafold.merge("base", ["adapter"], "out"),
    "merge_each": lambda: lorafold.merge_each("base", ["adapter"], "each"),
    "merge_into": lambda: lorafold.merge_into(model(), ["adapter"]),
    "run": lambda: lorafold.run(lorafold.plan("base", ["adapter"]), "out"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_merge_that_kept_little_warns_once_at_the_line_of_the_caller(here: Path, name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name]()
    (found,) = [each for each in caught if issubclass(each.category, LorafoldWarning)]
    assert found.filename == __file__
    assert found.lineno == inspect.getsourcelines(CALLS[name])[1]
    text = str(found.message)
    assert "of the update survived the rounding to BF16" in text
    assert "`rounding='stochastic'`" in text
    assert "--" not in text


def test_a_pipeline_warns_once_too(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    adapter = write(tmp_path / "a.safetensors", as_kohya({"lora_unet": pairs(unet(), UNET)}, alpha=1e-4))
    with pytest.warns(LorafoldWarning) as caught:
        lorafold.merge(base, [adapter], tmp_path / "out")
    assert [each.filename for each in caught] == [__file__]


def test_what_keeps_the_update_does_not_warn(here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lorafold.merge("base", ["adapter"], "wide", dtype="float32")
        lorafold.merge("base", ["adapter"], "stochastic", rounding="stochastic")
        lorafold.verify("wide", "base", ["adapter"])
        lorafold.plan("base", ["adapter"])
        lorafold.inspect("adapter")


def test_the_command_line_prints_it_and_does_not_warn(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SystemExit) as ended:
            main(["merge", "base", "adapter", "-o", "out"])
    out, err = capfd.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out.count("of the update survived the rounding to BF16") == 1
    assert "warning: remedies: --rounding stochastic (unbiased), --dtype float32, or" in out
    with pytest.raises(SystemExit):
        main(["merge", "base", "adapter", "-o", "json", "--json"])
    assert "--rounding stochastic" in json.loads(capfd.readouterr().out)["warnings"][-1]


def test_the_text_of_a_report_is_what_the_command_line_prints(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain_adapter(here / "whole")
    with pytest.raises(SystemExit):
        main(["merge", "base", "whole", "-o", "one"])
    printed = capfd.readouterr().out.splitlines()
    text = str(lorafold.merge("base", ["whole"], "two")).splitlines()
    assert len(printed) == len(text) == 5
    assert printed[0] == text[0].replace("two", "one")
    assert printed[1:4] == text[1:4]
    assert [line.split()[0] for line in text[1:]] == ["merged", "kept", "verified", "written"]
    for arguments, value in (
        (["plan", "base", "whole"], lorafold.plan("base", ["whole"])),
        (["inspect", "whole"], lorafold.inspect("whole")),
        (["inspect", "base"], lorafold.inspect("base")),
        (["verify", "one", "--base", "base", "--adapter", "whole"], lorafold.verify("one", "base", ["whole"])),
        (["verify", "one"], lorafold.verify("one")),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert [line.rstrip() for line in capfd.readouterr().out.splitlines()] == str(value).splitlines()


def test_each_verb_is_a_line_in_the_log_and_each_phase_two(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lorafold"):
        lorafold.merge("base", ["adapter"], "out", dtype="float32")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "lorafold"]
    assert ("INFO", "merge: base + adapter → out") in lines
    assert [text.split(":")[0] for level, text in lines if level == "DEBUG"][:2] == ["merge", "merge"]
    assert sum(level == "INFO" for level, _ in lines) == 1

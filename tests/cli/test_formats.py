"""Formats on the command line: said by plan and inspect, chosen by flags, converted; the same flags for every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import formats
from lorafold.cli.main import main


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command's exit code, output and error output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert type(caught.value.code) is int
        return caught.value.code, out, err

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    formats.base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_format_is_explained_in_the_same_words(here: Path, run: Any) -> None:
    torch.manual_seed(1)
    held = formats.pairs(head=False)
    flags = ("--allow", "pickle", "--adapter-option", f"lora_alpha={formats.ALPHA:g}")
    norms = {name.removesuffix(".weight"): float(delta.double().norm()) for name, delta in formats.deltas(held).items()}
    for kind, write in formats.WRITERS.items():
        path = write(here / kind, held).name
        code, out, err = run("inspect", path, "--json", *flags, "--base", "base")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["kind"], found["format"]) == ("adapter", kind)
        for module in found["modules"].values():
            assert (module["r"], module["scaling"]) == (formats.R, formats.ALPHA / formats.R)
            assert module["why"].startswith(("lora_alpha 6", "scale 3", "adapter.lora.alpha 6"))
        assert {name: module["norm"] for name, module in found["modules"].items()} == pytest.approx(norms, rel=1e-12)
        code, out, err = run("inspect", path, *flags)
        if kind == "litgpt":
            assert (code, "--base BASE" in err) == (1, True)
        else:
            assert f"a LoRA adapter in the format {kind}" in out
        assert f"adapter   {kind}, in the format {kind}" in run("plan", "base", path, *flags)[1]


def test_a_pickle_is_merged_and_verified_with_the_same_flags(here: Path, run: Any) -> None:
    formats.loralib(here / "lora", formats.pairs())
    code, _, err = run("merge", "base", "lora.pt", "-o", "out")
    assert (code, "lora.pt, a pickle" in err, "--allow pickle" in err) == (1, True, True)
    code, _, err = run("merge", "base", "lora.pt", "-o", "out", "--allow", "pickle")
    assert (code, "--adapter-option lora_alpha=16" in err) == (1, True)
    flags = ("--allow", "pickle", "--adapter-option", "lora_alpha=6")
    assert run("merge", "base", "lora.pt", "-o", "out", *flags)[0] == 0
    assert run("verify", "out", "--base", "base", "--adapter", "lora.pt", *flags)[0] == 0
    code, _, err = run(
        "verify", "out", "--base", "base", "--adapter", "lora.pt", "--allow", "pickle", "--adapter-option", "lora_alpha=7"
    )
    assert code == 3, err
    code, _, err = run("plan", "base", "lora.pt", "--adapter-option", "enable_lora=yes")
    assert (code, "true,false,true" in err) == (2, True)


def test_convert(here: Path, run: Any) -> None:
    torch.manual_seed(1)
    formats.peft(here / "adapter", formats.pairs())
    code, out, err = run("convert", "adapter", "-o", "a.gguf", "--to", "gguf", "--base", "base")
    assert (code, err) == (0, "")
    assert out.startswith("a.gguf is adapter (peft) in the format gguf: the same update, bit for bit\n  holds     15 modules, ")
    code, out, err = run("convert", "a.gguf", "-o", "back", "--to", "peft", "--base", "base", "--json")
    assert (code, err) == (0, "")
    assert {name: json.loads(out)[name] for name in ("source", "target", "modules")} == {
        "source": "gguf", "target": "peft", "modules": 15
    }  # fmt: skip
    one, two = (load_file(here / each / "adapter_model.safetensors") for each in ("adapter", "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run("convert", "adapter", "-o", "b.gguf", "--to", "gguf")
    assert (code, "--base BASE" in err, (here / "b.gguf").exists()) == (1, True, False)
    code, _, err = run("convert", "adapter", "-o", "a.gguf", "--to", "gguf", "--base", "base")
    assert (code, "a.gguf exists" in err) == (1, True)
    assert run("convert", "adapter", "-o", "a.gguf", "--to", "gguf", "--base", "base", "--overwrite")[0] == 0
    assert run("convert", "adapter", "-o", "c.safetensors", "--to", "kohya", "--adapter-option", "component=unet")[0] == 0
    assert run("convert", "adapter", "-o", "c", "--to", "onnx")[0] == 2


def test_every_command_that_reads_adapters_has_the_same_flags(run: Any) -> None:
    flags = ("--adapter-option", "format=", "lora_alpha=", "--allow pickle", "expert_layout=", "component=", "enable_lora=", "map=")
    for command in ("merge", "plan", "verify", "inspect", "convert"):
        text = run(command, "--help")[1]
        assert all(flag in text for flag in flags), command

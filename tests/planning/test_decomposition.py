"""What is said before weights are decomposed, which may take long."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from lorafold.planning import decomposition
from lorafold.planning.decomposition import decomposition_notes
from lorafold.planning.plan import Addend, Step
from models import llama, save_adapter, save_base


def step(kind: str | None, size: int) -> Step:
    addend = Addend(0, "q", "weight", False, 1.0, "", None, residual=kind)
    return Step("q.weight", "merge", "BF16", (size, size), "q.weight", (addend,))


def test_what_takes_long_is_said_and_what_does_not_is_not() -> None:
    assert decomposition_notes([step("pissa", 64), step(None, 8192), step("given", 8192), step("olora", 8192)]) == []
    (note,) = decomposition_notes([step("pissa", 4096)] * 4 + [step("olora", 64)])
    assert note.startswith("what olora, pissa took out of 5 weights is computed anew, which takes some 2 min of one processor")
    assert note.endswith("`ReadOptions(initial_adapter=…)`, the adapter as it was before training, takes no longer than any other")
    assert "initial_adapter" not in decomposition_notes([step("kasa", 4096)] * 3)[0], "which KaSA has no use for"


def test_it_is_said_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(decomposition, "_SHORT", 0.0)
    base = save_base(llama(), tmp_path / "base", torch.float32)
    adapter = save_adapter(llama(), tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa")
    plan = lorafold.plan(base, [adapter])
    said = [note for note in plan.notes if "pissa took out of 2 weights is computed anew" in note]
    assert len(said) == 1
    seen: list[str] = []

    def watch(phase: str, done: int, total: int) -> None:
        if not seen:
            seen.extend(record.getMessage() for record in caplog.records)

    with caplog.at_level(logging.WARNING, "lorafold"):
        lorafold.merge(base, [adapter], tmp_path / "out", progress=watch)
    assert seen == said


def test_the_command_line_prints_it_in_its_own_words(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save_file({"q_proj.weight": torch.eye(8)}, base / "model.safetensors")
    held = {"base_model.model.q_proj.lora_A.weight": torch.ones(1, 8), "base_model.model.q_proj.lora_B.weight": torch.ones(8, 1)}
    save_file(held, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    program = (
        "import sys; from lorafold.planning import decomposition; decomposition._SHORT = 0.0\n"
        "from lorafold.cli.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "merge", base, adapter, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "note: what pissa took out of 1 weights" in done.stderr
    assert "--adapter-option initial_adapter=" in done.stderr

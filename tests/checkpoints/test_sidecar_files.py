"""What goes with the weights and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lorafold
from lorafold.checkpoints.open import open_checkpoint
from lorafold.checkpoints.sidecar_files import left_behind, sidecar_paths
from lorafold.errors import CheckpointError
from models import plain_adapter, plain_base, refused

GO = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "qwen.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "LICENSE", "LICENSE.txt", "license.md", "LICENCE", "NOTICE", "USE_POLICY.md",
    "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
STAY = (
    "README.md", "pytorch_model.bin", "consolidated.00.pth", "model.gguf", "other.safetensors", "modeling_x.py",
    "tokenization_x.py", "tokenizer_x.py", "pytorch_model.bin.index.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin", "tokenizer.json.lock", ".gitattributes", ".git/config", "original/params.json",
    "lorafold.json", "additional_chat_templates/x.py", "eval_results.json", "notes.txt", "onnx/model.onnx",
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    root = tmp_path / "base"
    root.mkdir()
    save_file({"a": torch.zeros(1)}, root / "model.safetensors")
    for name in (*GO, *STAY):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    return root


def names(path: Path) -> set[str]:
    checkpoint = open_checkpoint(path)
    return {str(companion.relative_to(checkpoint.root)) for companion in sidecar_paths(checkpoint)}


def test_what_makes_a_model_goes_and_the_rest_stays(base: Path) -> None:
    assert names(base) == set(GO)


def test_row_41_code_is_not_copied(base: Path) -> None:
    assert not [name for name in names(base) if name.endswith(".py")]


def test_row_21_links_that_leave_and_what_is_no_file_are_not_copied(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    for name in ("vocab.json", "tokenizer.model"):
        (base / name).unlink()
    (base / "vocab.json").symlink_to("../secret")
    (base / "tokenizer.model").mkdir()
    (base / "LICENSE").unlink()
    (base / "LICENSE").symlink_to("LICENSE.txt")
    (base / "additional_chat_templates" / "rag.jinja").unlink()
    (base / "additional_chat_templates" / "rag.jinja").symlink_to("../../secret")
    gone = {"vocab.json", "tokenizer.model", "additional_chat_templates/rag.jinja"}
    assert names(base) == set(GO) - gone


def test_a_lone_file_has_companions_only_beside_a_config(base: Path) -> None:
    assert names(base / "model.safetensors") == set(GO)
    (base / "config.json").unlink()
    assert names(base / "model.safetensors") == set()
    assert names(base) == set(GO) - {"config.json"}


def test_everything_is_copied_or_left_with_a_reason(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    left = left_behind(checkpoint)
    flat = {name for several in left.values() for name in several}
    entries = {name.name + ("/" if name.is_dir() else "") for name in base.iterdir()}
    made = {"model.safetensors", "README.md", "lorafold.json", "additional_chat_templates/"}
    copied = {path.relative_to(base).as_posix() for path in sidecar_paths(checkpoint)}
    assert flat - {"additional_chat_templates/x.py"} == entries - made - copied
    reasons = {name: why for why, several in left.items() for name in several}
    assert reasons["modeling_x.py"] == "code, which is never copied"
    assert reasons["pytorch_model.bin"].startswith("weights that are not of this checkpoint")
    assert reasons["trainer_state.json"] == "the state of a training run"
    assert reasons["onnx/"] == "a folder that is no known part of a model"


def modules(root: Path, *folders: str, listed: Any = None) -> None:
    names = ["", *folders]
    found = [{"idx": i, "name": str(i), "path": path, "type": "sentence_transformers.models.X"} for i, path in enumerate(names)]
    (root / "modules.json").write_text(json.dumps(found if listed is None else listed))


def test_a_sentence_transformers_model_stays_one(tmp_path: Path) -> None:
    """With all that its modules hold, weights too, in the output, in its proof, in its undo file; every other file is named."""
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    modules(base, "1_Pooling", "2_Dense", "3_Normalize")
    for name in ("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Dense/config.json"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("{}")
    save_file({"linear.weight": torch.randn(2, 3)}, base / "2_Dense" / "model.safetensors")
    (base / "2_Dense" / "evil.py").write_text("")
    (base / "2_Dense" / "out").symlink_to("/etc/passwd")
    (base / "1_Pooling" / "up").symlink_to("..")
    (base / "data_config.json").write_text("[]")
    report = lorafold.merge(base, [adapter], tmp_path / "out", undo=tmp_path / "undo")
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out" / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]
    said = "\n".join(report.notes)
    for name in ("2_Dense/evil.py", "2_Dense/out", "1_Pooling/up", "data_config.json"):
        assert name in said
    assert lorafold.verify(tmp_path / "out", base, [adapter]).failures == ()
    (tmp_path / "out" / "2_Dense" / "model.safetensors").write_bytes(b"x")
    assert any("2_Dense/model.safetensors" in each for each in lorafold.verify(tmp_path / "out").failures)
    lorafold.merge(base, [adapter], tmp_path / "again", undo=tmp_path / "second")
    lorafold.unmerge(tmp_path / "again", tmp_path / "back", undo=tmp_path / "second")
    assert (tmp_path / "back" / "2_Dense" / "model.safetensors").read_bytes() == (
        base / "2_Dense" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../x", "C:\\x", "a\nb"])
def test_row_22_a_module_that_is_said_to_be_elsewhere(tmp_path: Path, path: str) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    modules(base, path)
    refused(base, [adapter], CheckpointError, "modules.json", "no path in the checkpoint's folder")


def test_a_list_of_modules_that_is_damaged(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    modules(base, listed=[{"type": "sentence_transformers.models.Dense"}])
    refused(base, [adapter], CheckpointError, "modules.json must list modules")
    modules(base, listed={"somebody": "else's"})
    lorafold.merge(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").exists()


def test_a_folder_of_a_module_that_is_a_link_out_is_not_followed(tmp_path: Path) -> None:
    base, adapter = plain_base(tmp_path / "base"), plain_adapter(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.json").write_text("{}")
    (base / "1_Pooling").symlink_to("../elsewhere")
    modules(base, "1_Pooling")
    report = lorafold.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out" / "1_Pooling").exists()
    assert any("1_Pooling" in note for note in report.notes)

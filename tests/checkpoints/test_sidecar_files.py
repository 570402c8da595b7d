"""What goes with the weights and what stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafold.checkpoints.open import open_checkpoint
from lorafold.checkpoints.sidecar_files import companions

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
    return {str(companion.relative_to(checkpoint.root)) for companion in companions(checkpoint)}


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

"""What stands beside the weights: configuration, tokenizer and the rest of the base's files, and the model card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..adapters import Adapter
from ..checkpoint import Checkpoint, companions, copy_file, write_json, write_text
from ..errors import printable
from ..planning import MergePlan
from ..steps import edited
from .modelcard import model_card

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
)  # fmt: skip


def write_beside(
    folder: Path, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter], *, command: str | None = None
) -> tuple[str, ...]:
    """Write everything but weights and receipt into `folder`; notes on what was decided.

    `command` is what made the checkpoint, for its model card.
    """
    notes: list[str] = []
    tokenizers, note = _tokenizer_files(adapters)
    notes += note
    for name, source in tokenizers.items():
        copy_file(source, folder / name)
    for source in companions(checkpoint):
        name = str(source.relative_to(checkpoint.root))
        if name == "config.json":
            continue
        if not (tokenizers and _is_tokenizer(name)):
            copy_file(source, folder / name)
    if checkpoint.config is not None:
        write_json(folder / "config.json", edited(checkpoint.config, plan.config))
    write_text(folder / "README.md", model_card(plan, checkpoint, command))
    return tuple(notes)


def _tokenizer_files(adapters: Sequence[Adapter]) -> tuple[dict[str, Path], list[str]]:
    """The tokenizer files of the first adapter that brings its own: they win, all together, over the base's."""
    for adapter in adapters:
        names = sorted(name for name in os.listdir(adapter.path) if _is_tokenizer(name) and (adapter.path / name).is_file())
        if "tokenizer_config.json" in names or "tokenizer.json" in names:
            return {name: adapter.path / name for name in names}, [
                f"the tokenizer is that of the adapter {printable(adapter.name)}, not the base's"
            ]
    return {}, []


def _is_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)

"""Which files stand beside the weights, and where each one comes from: the base's, or the tokenizer that an adapter brings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..adapters.adapter import Adapter
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.sidecars import companions
from ..checkpoints.symlinks import resolve_entry
from ..errors import printable

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "additional_chat_templates/*",
)  # fmt: skip


def files_beside(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[dict[str, Path], list[str]]:
    """The source of each file that is copied, by its name in the output, and notes on what was decided.

    config.json, the model card, the index and the receipt are not copied but made.

    Raises `CheckpointError` where a tokenizer's file is a link that leaves the adapter's folder.
    """
    tokenizer, notes = _tokenizer_files(adapters)
    names = {str(path.relative_to(checkpoint.root)): path for path in companions(checkpoint)}
    names = {name: path for name, path in names.items() if name != "config.json" and not (tokenizer and _is_tokenizer(name))}
    return names | tokenizer, notes


def _tokenizer_files(adapters: Sequence[Adapter]) -> tuple[dict[str, Path], list[str]]:
    """The tokenizer files of the first adapter that brings its own: they win, all together, over the base's."""
    for adapter in adapters:
        if not adapter.path.is_dir():
            continue  # one file, beside which anything may lie
        names = sorted(name for name in os.listdir(adapter.path) if _is_tokenizer(name) and (adapter.path / name).is_file())
        if "tokenizer_config.json" in names or "tokenizer.json" in names:
            files = {name: resolve_entry(adapter.path, name) for name in names}
            return files, [f"the tokenizer is that of the adapter {printable(adapter.name)}, not the base's"]
    return {}, []


def _is_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER)

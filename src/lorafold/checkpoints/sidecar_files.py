"""The files that make weights a model: which of them go with a merged checkpoint, and which stay behind.

What goes: configuration, tokenizer, chat template, processors, licence and notice. What stays: other weight formats, indexes of
files that are not copied, code, the state of a training run, and the model card, which is written anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .symlinks import resolve_entry

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.*",
    "chat_template*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
    "video_processor_config.json",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
)
"""Names that are copied, in lower case: LICENSE and License.txt are both written."""

_FOLDERS = ("additional_chat_templates",)

_LEFT_BEHIND = ("*.py", "*.pyc", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "*.lock", "*.tmp")


def companions(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files to copy beside merged weights, as paths below the checkpoint's folder, in the order of their names.

    A lone file without a config.json beside it has none. Links that leave the folder are not followed.
    """
    root = checkpoint.root
    if checkpoint.lone and checkpoint.config is None:
        return ()
    found = [entry for entry in sorted(os.listdir(root)) if _goes_along(entry)]
    for folder in _FOLDERS:
        if (root / folder).is_dir():
            found += [f"{folder}/{entry}" for entry in sorted(os.listdir(root / folder)) if not _left_behind(entry)]
    return tuple(root / entry for entry in found if _is_own_file(root, entry))


def _goes_along(name: str) -> bool:
    return not _left_behind(name) and any(fnmatchcase(name.lower(), pattern) for pattern in _PATTERNS)


def _left_behind(name: str) -> bool:
    return name.startswith(".") or any(fnmatchcase(name.lower(), pattern) for pattern in _LEFT_BEHIND)


def _is_own_file(root: Path, entry: str) -> bool:
    try:
        return resolve_entry(root, entry).is_file()
    except CheckpointError:
        return False


_BESIDE = ("README.md", "lorafold.json")


def files_beside_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """By name what makes up `checkpoint` beside its weights: index, what goes along with them, its model card and its receipt.

    Raises `CheckpointError` where one is a link that leaves the folder.
    """
    for path in companions(checkpoint):
        yield str(path.relative_to(checkpoint.root)), path
    if checkpoint.lone:
        return
    index = [checkpoint.index_name] if checkpoint.indexed else []
    for name in (*index, *_BESIDE):
        if (checkpoint.root / name).exists():
            resolve_entry(checkpoint.root, name)
            yield name, checkpoint.root / name

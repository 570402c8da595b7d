"""Files in the folder of a checkpoint that do not belong to it: what a program may read, and what people put there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..checkpoints.receipt import RECEIPT_NAME
from ..errors import printable
from .modelcard import CARD_NAME

OF_PEOPLE = (
    "*.md", "*.rst", "*.txt", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4",
)  # fmt: skip
"""Documents and pictures, which no program reads for the model. Hidden files and folders, of version control and hubs, go with
them."""

READ_ALL_THE_SAME = (
    "vocab*.txt",
    "merges*.txt",
    "dict.txt",
    "licen[cs]e*",
    "notice*",
    "use_policy*",
    "requirements*.txt",
    "prompt*",
)
"""But these are read: by the tokenizers of transformers (their `vocab_files_names`), and by whoever asks what is allowed."""


def added_files(folder: Path, own: Collection[str]) -> tuple[list[str], list[str]]:
    """The files in `folder` that are not among its `own`, by their path in it: those that count, and those of people.

    The model card and the receipt are its own; a folder that is hidden is one entry.
    """
    others = [name for name in files_in(folder) if name not in own and name not in (CARD_NAME, RECEIPT_NAME)]
    harmless = [name for name in others if _is_of_people(name)]
    return [name for name in others if name not in harmless], harmless


def files_in(folder: Path) -> Iterator[str]:
    """Every file below `folder`, by its path in it, in order; of a hidden folder, and of a link to one, the name alone."""
    for place, folders, files in os.walk(folder):
        apart = [name for name in folders if name.startswith(".") or os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if name not in apart)
        for name in sorted([*files, *(f"{name}/" for name in apart)]):
            yield os.path.relpath(os.path.join(place, name), folder) + ("/" if name.endswith("/") else "")


def not_part(names: Collection[str]) -> list[str]:
    """In words, that the files `names` do not belong."""
    return [f"{printable(name)} is not part of the checkpoint" for name in names]


def _is_of_people(path: str) -> bool:
    name = path.rstrip("/").rpartition("/")[2].lower()
    if name.startswith("."):
        return True
    read = any(fnmatchcase(name, pattern) for pattern in READ_ALL_THE_SAME)
    return not read and any(fnmatchcase(name, pattern) for pattern in OF_PEOPLE)

"""What `verify` claims: for each kind of change to an output, whether it fails, is noted, or is not looked at.

| what was changed, removed or added | with base and adapters | by the receipt |
|---|---|---|
| a tensor: bits, dtype, shape, name | fails, recomputed | fails, by its file's hash |
| the header of a file of weights, its metadata included | fails | fails |
| config.json, index, tokenizer and all else that was written beside the weights, to the last byte | fails | fails |
| lorafold.json, to the last byte | fails | fails |
| a file that a program may read: weights, configurations, tokenizers, templates, adapters, code | fails | fails |
| README.md, the model card | noted | noted |
| documents, pictures, hidden files and folders that were added | noted | noted |
| lorafold.json, and the hash in it to match | fails, but for `REWRITTEN` | not covered |
| times, permissions and owners of files; empty folders; a file that became a link to the same bytes | not covered | not covered |

Overlays (`--only-changed`), outputs of a single file and the components of pipelines are held to the same table. A merge with
`--no-verify` writes no hashes of weights, and can be verified with base and adapters alone.

Which files do not belong to an output, and whether a program may read them, is told here by name.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ..checkpoints.receipt import RECEIPT_NAME
from ..errors import printable
from .modelcard import CARD_NAME

REWRITTEN = (
    "the version, names of folders, and options that make no bit differ",
    "numbers of what was kept, beyond their third digit",
    "fields and hashes that it leaves out",
)
"""What a receipt may say that cannot be computed anew; its own hash shows a change all the same."""

_ALWAYS = (
    "README.md, documents, pictures and hidden files: a change is noted, and does not fail",
    "times, permissions and owners of files, empty folders, and links in place of files",
)


def not_covered(*, by_receipt: bool, only_changed: bool = False) -> tuple[str, ...]:
    """What is not covered, in words; `by_receipt`: without base and adapters, `only_changed`: of an overlay."""
    if not by_receipt:
        return (f"in a lorafold.json whose own hash was rewritten as well: {'; '.join(REWRITTEN)}", *_ALWAYS)
    found = ["whether it is what base and adapters make, and a lorafold.json whose own hash was rewritten: give both for that"]
    if only_changed:
        found.append("the base that the overlay is for: give it, and the adapters")
    return (*found, *_ALWAYS)


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

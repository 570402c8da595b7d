"""Which file an entry of a checkpoint's folder stands for: links stay in the folder, or lead into their own hub cache.

A snapshot in a hub cache is a folder of links to ``../../blobs/<hash>`` of the same repository. Any other link that leaves its
folder is refused: what it leads to is not part of the checkpoint that was asked for.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, printable

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def resolve_entry(root: Path, name: str) -> Path:
    """The real path of the entry `name` of the folder `root`; the entry exists.

    Raises `CheckpointError` where it does not exist, is a loop of links, or leads out of the folder other than into the hub
    cache that the folder is a snapshot of.
    """
    entry = root / name
    shown = printable(str(entry))
    try:
        home = root.resolve(strict=True)
        real = entry.resolve(strict=True)
    except FileNotFoundError:
        broken = " (a symbolic link to nothing)" if entry.is_symlink() else ""
        raise CheckpointError(f"{shown}: no such file{broken}") from None
    except (OSError, ValueError, RuntimeError) as cause:  # RuntimeError: how pathlib reports a loop before Python 3.13
        reason = cause.strerror if isinstance(cause, OSError) else str(cause)
        raise CheckpointError(f"{shown} cannot be followed: {printable(str(reason))}") from cause
    if real.is_relative_to(home):
        return real
    blobs = _blobs(home)
    if blobs is None or real.parent != blobs or not _HASH.fullmatch(real.name):
        raise CheckpointError(
            f"{shown} is a symbolic link that leaves its folder: it leads to {printable(str(real))}",
            hint="copy the file into the folder; only a hub cache may link to its own blobs",
        )
    return real


def blob_sha256(real: Path) -> str | None:
    """The SHA-256 that the hub cache gives the file at `real` by its name; None outside a cache."""
    return real.name if real.parent.name == "blobs" and len(real.name) == 64 and _HASH.fullmatch(real.name) else None


def _blobs(home: Path) -> Path | None:
    """The blobs of the hub cache that the folder `home` is, or is in, a snapshot of."""
    for revision in (home, *home.parents):
        if revision.parent.name == "snapshots":
            blobs = Path(os.path.realpath(revision.parent.parent / "blobs"))
            return blobs if blobs.is_dir() else None
    return None

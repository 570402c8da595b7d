"""Whether the bytes of the inputs are those that were meant: by hashes that the user has, or that a hub cache has in its names.

The format has no checksum: a flipped bit in a weight is a weight. Only a hash that comes from elsewhere tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError, InputError, nearest_names, printable
from ..files.regular import sha256_of
from .locate import blob_sha256


def check_hashes(
    files: Sequence[Path],
    expected: Mapping[str, str],
    *,
    named_by_hash: bool = False,
    hash_of: Callable[[Path], str] = sha256_of,
) -> dict[str, str]:
    """The sha256 of each of `files` that could be checked, by its path, all of them as they must be.

    - `expected`: sha256 by the last part of a path, or by more of it where several files have the same name
    - `named_by_hash`: also hold each blob of a hub cache to its name

    Raises `CheckpointError` where a file has another hash, and `InputError` where `expected` names none of `files`, or several.
    """
    wanted: dict[Path, str] = {}
    for name, sha256 in expected.items():
        wanted[_named(name, files)] = sha256.lower()
    if named_by_hash:
        for path in files:
            if (blob := blob_sha256(path.resolve())) is not None:
                wanted.setdefault(path, blob)
    found = {path: hash_of(path) for path in wanted}
    for path, sha256 in wanted.items():
        if found[path] != sha256:
            raise CheckpointError(
                f"{printable(str(path))} is not the file that was meant: expected sha256 {printable(sha256)}, found {found[path]}",
                hint="nothing was written; copy or download it again",
            )
    return {str(path): sha256 for path, sha256 in found.items()}


def _named(name: str, files: Sequence[Path]) -> Path:
    parts = Path(name).parts
    fit = [path for path in files if path.parts[-len(parts) :] == parts]
    if len(fit) == 1:
        return fit[0]
    if fit:
        raise InputError(
            f"'{printable(name)}' is the name of {len(fit)} input files: {', '.join(printable(str(path)) for path in fit)}",
            hint="write more of its path",
        )
    names = [path.name for path in files]
    near = nearest_names(name, names)
    listed = ", ".join(printable(each) for each in names[:6])
    raise InputError(
        f"'{printable(name)}' is none of the input files: {listed}" + ("" if len(names) <= 6 else f" and {len(names) - 6} more"),
        hint=f"did you mean {printable(near[0])}?" if near else None,
    )

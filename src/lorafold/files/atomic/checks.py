"""Whether an output may be written where it was asked for, and what the system says when writing fails, as an `OutputError`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import OutputError, OutputExistsError, printable


def free_bytes(path: Path) -> int | None:
    """Bytes free to this user on the file system of `path` or of its nearest folder that exists; None where it does not say."""
    for place in (path, *path.parents):
        try:
            status = os.statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        return status.f_bavail * status.f_frsize
    return None


def output_fault(cause: OSError, path: Path, needed: int | None = None) -> OutputError:
    """The error to raise where writing `path`, of `needed` bytes, failed with `cause`."""
    parts = [f"{printable(str(path))} cannot be written: {cause.strerror or cause}"]
    free = free_bytes(path)
    if needed is not None:
        parts.append(f"needed {needed} bytes" + ("" if free is None else f", free {free}"))
    return OutputError("; ".join(parts), hint=_HINTS.get(cause.errno or 0))


_HINTS = {
    errno.ENOSPC: "free some space, or write to another file system",
    errno.EDQUOT: "your quota on this file system is used up: free some of it, or write to another",
    errno.EFBIG: "the file is larger than this process or file system allows: see `ulimit -f`, or write smaller shards",
    errno.EROFS: "the file system is read-only: write to another",
    errno.EACCES: "you may not write there: choose another place, or change its permissions",
    errno.EIO: "the disk reports a fault: look at the system's log",
}


def require_space(path: Path, nbytes: int) -> None:
    """Raises `OutputError` where the file system of `path`, or of its nearest folder that exists, has not `nbytes` free."""
    free = free_bytes(path)
    if free is not None and free < nbytes:
        raise OutputError(
            f"{printable(str(path))} cannot be written: needed {nbytes} bytes, free {free}",
            hint="free some space, or write to another file system",
        )


def check_parent(out: Path) -> None:
    """Raises `OutputError` where the folder that `out` is to appear in does not exist or may not be written to."""
    parent = out.parent
    shown = printable(str(parent))
    if out.name in ("", ".", ".."):
        raise OutputError(f"{printable(str(out))} cannot be an output: it has no name of its own")
    if not parent.exists():
        raise OutputError(f"{printable(str(out))} cannot be written: there is no folder {shown}", hint=f"mkdir -p {shown}")
    if not parent.is_dir():
        raise OutputError(f"{printable(str(out))} cannot be written: {shown} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{printable(str(out))} cannot be written: no permission to write in {shown}")


def check_absent(out: Path, overwrite: bool) -> None:
    """Raises `OutputExistsError` where something is at `out` that may not be replaced.

    An empty folder may; with `overwrite` so may a folder that holds a checkpoint. Anything else is not lorafold's to remove.
    """
    if not os.path.lexists(out):
        return
    shown = printable(str(out))
    if not out.is_dir():
        raise OutputExistsError(f"{shown} exists and is not a folder", hint="choose another output")
    if os.path.ismount(out):
        raise OutputError(
            f"{shown} is where a file system is mounted, so no folder can be put in its place", hint="choose one in it"
        )
    names = os.listdir(out)
    if not names:
        return
    if not overwrite:
        raise OutputExistsError(
            f"{shown} exists and is not empty: it holds {len(names)} entries", hint="`overwrite=True` replaces it"
        )
    if not any(name in ("config.json", "model_index.json", "lorafold.json") or name.endswith(".safetensors") for name in names):
        raise OutputExistsError(
            f"{shown} exists and does not look like a checkpoint, so it is not replaced", hint="remove it yourself"
        )


def check_apart(out: Path, inputs: Sequence[Path], *, linked: bool = False) -> None:
    """Raises `OutputError` where `out` is one of `inputs`, lies in one, holds one, or shares a file with one.

    Compared by device and inode, so through links and mounts too.

    - `linked`: a file in `out` may be a second name of an input's, which goes on without it
    """
    shown = printable(str(out))
    above = set(_identities_above(out))
    place = _identity(out)
    own_files = _file_identities(out)
    for path in inputs:
        where = printable(str(path))
        mine = _identity(path)
        if mine is None:
            continue
        if mine == place:
            raise OutputError(f"{shown} cannot be the output: it is the input {where}", hint="choose another output")
        if mine in above:
            raise OutputError(f"{shown} cannot be the output: it lies in the input {where}", hint="choose another output")
        if place is not None and place in _identities_above(path):
            raise OutputError(f"{shown} cannot be the output: the input {where} lies in it", hint="choose another output")
        files = _file_identities(path) if path.is_dir() else {mine: path.name}
        shared = own_files.keys() & files.keys()
        if linked:
            shared = {each for each in shared if not _apart_by_name(out / own_files[each], path, files[each])}
        if shared:
            name = printable(own_files[min(shared)])
            raise OutputError(
                f"{shown} cannot be the output: its {name} is a file of the input {where}",
                hint="choose another output; what `link=True` made can be replaced with `link=True` again",
            )


_Identity = tuple[int, int]


def _identity(path: Path) -> _Identity | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _apart_by_name(own: Path, place: Path, name: str) -> bool:
    """Whether the file of the input `place` stays where `own`, which is the same file, is removed."""
    theirs = place / name if place.is_dir() else place
    return not own.is_symlink() and own.stat().st_nlink > 1 and os.path.realpath(own) != os.path.realpath(theirs)


def _identities_above(path: Path) -> Iterator[_Identity]:
    """The folders that `path` lies in, both as it is written and where its links lead."""
    for start in (Path(os.path.abspath(path)), Path(os.path.realpath(path))):
        for folder in start.parents:
            identity = _identity(folder)
            if identity is not None:
                yield identity


def _file_identities(folder: Path) -> dict[_Identity, str]:
    """The files in `folder`, links followed, by identity; none where it is not a folder."""
    if not folder.is_dir():
        return {}
    found = ((_identity(folder / name), name) for name in os.listdir(folder) if (folder / name).is_file())
    return {identity: name for identity, name in found if identity is not None}

"""Which files of a folder make up the checkpoint: an index with its shards, or one file; and which file an entry stands for.

Where there is neither, what else is there decides what the error says. Links stay in the folder, or lead into their own hub cache:
a snapshot there is a folder of links to ``../../blobs/<hash>`` of the same repository. Any other link that leaves its folder is
refused: what it leads to is not part of the checkpoint that was asked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError, nearest_names, printable
from .index import INDEX_NAME

_SINGLE = "model.safetensors"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".pdparams", ".mlmodel")


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is: its folder, the name of its index, and that of its one file; at least one of the two is there."""

    root: Path
    index: str | None
    single: str | None


def locate(path: Path) -> Location:
    """The files that may make up the checkpoint at `path`, a folder or one .safetensors file.

    Raises `CheckpointError` where there is none, several could be meant, or it is something else.
    """
    shown = printable(str(path))
    try:
        if not path.exists():
            raise _missing(path)
        if not path.is_dir():
            return _single_file(path)
        names = sorted(entry.name for entry in os.scandir(path))
    except (OSError, ValueError) as cause:
        if isinstance(cause, InputError):
            raise
        reason = cause.strerror if isinstance(cause, OSError) else str(cause)
        raise CheckpointError(f"{shown} cannot be read: {reason}") from cause

    index = _index(path, names)
    singles = [name for name in names if name.endswith(".safetensors") and name != "adapter_model.safetensors"]
    single: str | None
    if _SINGLE in singles:
        single = _SINGLE
    elif _DIFFUSERS in singles and all(name.startswith(_DIFFUSERS.removesuffix("safetensors")) for name in singles):
        single = _DIFFUSERS  # beside it are the same weights in other dtypes, as diffusion_pytorch_model.fp16.safetensors
    elif index is not None:
        stem = index.removesuffix(_INDEX_SUFFIX) + ".safetensors"
        single = stem if stem in singles else None
    else:
        single = singles[0] if len(singles) == 1 else None
    if index is not None or single is not None:
        return Location(path, index, single)
    raise _nothing(path, names, singles)


def _single_file(path: Path) -> Location:
    if path.name == "adapter_model.safetensors":
        raise _adapter(path, [path.name])
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{printable(str(path))} is neither a folder nor a .safetensors file",
            hint="give the folder that holds the checkpoint"
            if path.name.endswith(_INDEX_SUFFIX)
            else "convert the weights to safetensors first"
            if path.suffix in _OTHER_FORMATS
            else None,
        )
    return Location(path.parent, None, path.name)


def _index(path: Path, names: list[str]) -> str | None:
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if INDEX_NAME in indexes:
        return INDEX_NAME
    if len(indexes) > 1:
        raise CheckpointError(f"{printable(str(path))} holds several indexes: {_listed(indexes)}")
    return indexes[0] if indexes else None


def _missing(path: Path) -> CheckpointError:
    hint = "give the path of a folder that holds a checkpoint; models are not downloaded"
    if path.is_symlink():
        return CheckpointError(f"{printable(str(path))} is a symbolic link to nothing", hint=hint)
    try:
        near = nearest_names(path.name, [entry.name for entry in os.scandir(path.parent)])
    except OSError:
        near = []
    if near:
        hint = f"did you mean {printable(str(path.parent / near[0]))}?"
    return CheckpointError(f"{printable(str(path))}: no such folder or file", hint=hint)


def _nothing(path: Path, names: list[str], singles: list[str]) -> CheckpointError:
    shown = printable(str(path))
    others = [name for name in names if name.endswith(_OTHER_FORMATS) and not name.startswith(("training_args", "adapter_model"))]
    if len(singles) > 1:
        return CheckpointError(
            f"{shown} holds {len(singles)} .safetensors files and no index that says what belongs together: {_listed(singles)}",
            hint=f"add the {INDEX_NAME} that the model was published with, or give the path of one file",
        )
    if "adapter_config.json" in names or any(name.startswith("adapter_model.") for name in names):
        return _adapter(path, [name for name in names if name.startswith("adapter_")])
    if others:
        return CheckpointError(
            f"{shown} has no .safetensors file, only {_listed(others)}",
            hint="give the path of the .gguf file, or of one of its parts"
            if all(name.endswith(".gguf") for name in others)
            else "convert the weights to safetensors first",
        )
    folders = [name for name in names if (path / name).is_dir() and any((path / name).glob("*.safetensors"))]
    hint = (
        f"did you mean {printable(str(path / folders[0]))}?"
        if folders
        else "give the folder that holds config.json and the weights"
    )
    return CheckpointError(f"{shown} has no .safetensors file: it holds {_listed(names) or 'nothing'}", hint=hint)


def _adapter(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{printable(str(path))} is an adapter, not a base checkpoint: it has {_listed(names)} and no model weights",
        hint="give the base model first, then the adapter",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"


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

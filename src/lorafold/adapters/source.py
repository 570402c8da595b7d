"""What is at an adapter's path, looked at once: the files that are there, their headers, the configurations beside them.

Every format is asked about the same `Source`; which one fits is for the formats.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import AdapterConfigError, AdapterError, UnsupportedAdapterError, printable
from ..files import strictjson
from ..files.gguf.gguf_header import MAGIC, read_gguf_header
from ..files.regular import open_regular
from ..files.safetensors.header import read_header
from ..files.safetensors.info import Header
from .pickles import read_pickled
from .read_options import ReadOptions

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".lora")
"""Endings of the files that torch.save writes."""


@dataclass(frozen=True)
class Source:
    """A folder, or one file and the folder that it lies in.

    - `path`: what was given; `file`: the name of the one file that was given, or None
    - `names`: of the files in the folder
    - `options`: what the user said about it
    """

    path: Path
    folder: Path
    file: str | None
    names: frozenset[str]
    options: ReadOptions
    _read: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shown(self) -> str:
        """The path, for errors."""
        return printable(str(self.path))

    @property
    def name(self) -> str:
        """A name for people: the folder's, or the file's without its ending."""
        return self.path.resolve().name if self.file is None else self.path.stem

    def find(self, *patterns: str) -> str | None:
        """The file that the first of `patterns` matches alone; where one file was given, no other can be found.

        >>> source = Source(Path("a"), Path("a"), None, frozenset({"one.pt", "x.json"}), ReadOptions())
        >>> source.find("adapter.pt", "*.pt"), source.find("*.safetensors")
        ('one.pt', None)
        """
        names = self.names if self.file is None else {self.file}
        for pattern in patterns:
            found = [name for name in names if fnmatchcase(name, pattern)]
            if len(found) == 1:
                return found[0]
        return None

    def header(self, name: str) -> Header:
        """The header of the file `name` of tensors: safetensors, GGUF, or a file of torch.save where pickles are allowed.

        Raises `CheckpointError` or `AdapterError` where it is damaged, `UnsupportedAdapterError` where it may not be read.
        """
        if name not in self._read:
            self._read[name] = _read_tensors(self.folder / name, self.options)
        header: Header = self._read[name]
        return header

    def config(self, name: str) -> Mapping[str, Any]:
        """The object in the JSON file `name`.

        Raises `AdapterConfigError` where it is none.
        """
        if name not in self._read:
            fields = strictjson.load(self.folder / name, error=AdapterConfigError)
            if not isinstance(fields, dict):
                raise AdapterConfigError(f"{printable(str(self.folder / name))} must hold an object, not {type(fields).__name__}")
            self._read[name] = fields
        found: Mapping[str, Any] = self._read[name]
        return found

    def sha256(self, *names: str) -> str:
        """Of the files `names`, one after the other, hexadecimal.

        Raises `AdapterError` where one cannot be read.
        """
        digest = hashlib.sha256()
        for name in names:
            fd, _ = open_regular(self.folder / name, error=AdapterError)
            with open(fd, "rb", buffering=0) as file:
                try:
                    while block := file.read(1 << 20):
                        digest.update(block)
                except OSError as cause:
                    raise AdapterError(f"{printable(str(self.folder / name))} cannot be read: {cause.strerror}") from cause
        return digest.hexdigest()


def look(path: Path, options: ReadOptions) -> Source:
    """What is at `path`.

    Raises `AdapterError` where there is nothing, or it cannot be read.
    """
    shown = printable(str(path))
    if not os.path.lexists(path):
        raise AdapterError(f"{shown} does not exist", hint=_beside(path))
    folder = path if path.is_dir() else path.parent
    try:
        names = frozenset(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as cause:
        raise AdapterError(f"{printable(str(folder))} cannot be read: {cause.strerror}") from cause
    return Source(path, folder, None if path.is_dir() else path.name, names, options)


def _read_tensors(path: Path, options: ReadOptions) -> Header:
    """The header of the file at `path`, of whatever kind its name and its first bytes say it is."""
    fd, _ = open_regular(path, error=AdapterError)
    with open(fd, "rb") as file:
        first = file.read(4)
    if first == MAGIC:
        return read_gguf_header(path, error=AdapterError)
    if first != b"PK\x03\x04" and path.suffix not in PICKLES:
        return read_header(path)
    if not options.allow_pickle:
        raise UnsupportedAdapterError(
            f"{printable(str(path))}, a pickle, may run code when it is loaded",
            hint="`ReadOptions(allow_pickle=True)` reads it with torch.load(weights_only=True); or save its tensors as"
            " adapter_model.safetensors where you trust it",
        )
    return read_pickled(path)


def _beside(path: Path) -> str:
    from difflib import get_close_matches

    try:
        names = os.listdir(path.parent)
    except OSError:
        return "check the path; adapters are read from disk, not from a hub"
    near = get_close_matches(path.name, names, n=1)
    return (
        f"did you mean {printable(str(path.parent / near[0]))}?"
        if near
        else "check the path; adapters are read from disk, not from a hub"
    )

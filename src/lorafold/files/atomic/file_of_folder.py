"""One file of a staged folder that appears alone: an output that is a file, made where there is room for all that a run keeps."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import OutputError, OutputExistsError, printable
from .folder import StagedFolder


class StagedFileOfFolder(StagedFolder):
    """As `StagedFolder`, but `commit` puts only the one file in it that ends as `out` does at `out`, by one rename; the rest goes.

    With `overwrite` a file is replaced, and a folder never.
    """

    def check_place(self) -> None:
        """Raises `OutputExistsError` where something is at `out` that may not be replaced."""
        if not os.path.lexists(self.out):
            return
        shown = printable(str(self.out))
        if not self.out.is_file():
            raise OutputExistsError(f"{shown} exists and is not a file", hint="give the path of a file that is not there yet")
        if not self.overwrite:
            raise OutputExistsError(f"{shown} exists", hint="`overwrite=True` replaces it")

    def _replace(self, path: Path) -> Path | None:
        names = [name for name in os.listdir(path) if name.endswith(self.out.suffix)]
        if len(names) != 1:
            raise OutputError(
                f"{printable(str(self.out))} cannot be written: it would be {len(names)} files", hint="give the path of a folder"
            )
        os.rename(path / names[0], self.out)
        return path


def staging(out: Path) -> type[StagedFolder]:
    """What an output at `out` is made in: one in GGUF is a file, all others are folders."""
    return StagedFileOfFolder if out.suffix == ".gguf" else StagedFolder

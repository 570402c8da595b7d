"""One file of a staged folder that appears alone: an output that is a file, made where there is room for all that a run keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import OutputExistsError, printable
from .folder import StagedFolder


class StagedFileOfFolder(StagedFolder):
    """As `StagedFolder`, but `commit` puts only its file `name` at `out`, by one rename, and removes the folder.

    With `overwrite` a file is replaced, and a folder never.
    """

    def __init__(self, out: Path | str, name: str, **how: Any) -> None:
        super().__init__(out, **how)
        self.name = name

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
        os.rename(path / self.name, self.out)
        return path

"""The undo files of a pipeline: a folder with one for each component that changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ...engine.resume import journal_fields
from ...engine.undofile.read import is_undo_file
from ...engine.undofile.session import plan_of
from ...errors import OutputError, OutputExistsError, printable
from ...files.atomic.checks import check_apart, check_parent, output_fault
from ...files.atomic.folder import StagedFolder
from ...options import RunOptions
from ..components import Planned


def undo_name(component: str) -> str:
    """What the undo file of a component is called."""
    return f"{component}.safetensors"


class UndoFolder:
    """The folder `run.undo` of the undo files of the pipeline that will be at `out`; nothing where that is None. A context manager.

    The files are put there one by one, each with its component. Entering makes the folder where there is none. Leaving when the
    pipeline is neither in its place nor left for a later run takes away what was put there.

    Raises `OutputExistsError` where something else is there, `OutputError` where it is or lies in an input or in `out`.
    """

    def __init__(self, run: RunOptions, out: Path, inputs: Sequence[Path], planned: Planned) -> None:
        self.path = None if run.undo is None else Path(run.undo)
        self._out, self._inputs = Path(os.path.realpath(out)), inputs
        self._plans = {
            component.name: plan_of({**journal_fields(plan, component.checkpoint), "link": run.link})
            for component, plan in planned.parts
        }
        self._folder: StagedFolder | None = None
        self._hidden: Path | None = None
        self._made = False
        self._before: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        if self.path is None:
            return self
        shown, real = printable(str(self.path)), Path(os.path.realpath(self.path))
        if real == self._out or real.is_relative_to(self._out):
            where = printable(str(self._out))
            raise OutputError(
                f"{shown} cannot hold the undo files: it is or lies in the output {where}", hint="choose a place beside it"
            )
        check_apart(real, self._inputs)
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise OutputExistsError(
                f"{shown} exists and is not a folder: of a pipeline each component has its undo file", hint="choose another place"
            )
        check_parent(real)
        self._before = frozenset(name for name in self._plans if os.path.lexists(self.path / undo_name(name)))
        try:
            self._made = not self.path.is_dir()
            self.path.mkdir(exist_ok=True)
        except OSError as cause:
            raise output_fault(cause, self.path) from cause
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self.path is None or (self._folder is not None and self._folder.committed):
            return
        if self._hidden is not None and self._hidden.exists():
            return  # the same command goes on from there
        try:
            for name in self._plans.keys() - self._before:
                if self.has(name):
                    os.unlink(self.path / undo_name(name))
            if self._made:
                os.rmdir(self.path)
        except OSError as cause:
            if exc is not None:
                exc.add_note(f"{printable(str(self.path))} has undo files of an output that there is not ({cause.strerror})")

    def follow(self, folder: StagedFolder) -> None:
        """The output is made in `folder`."""
        self._folder, self._hidden = folder, folder.path

    def file(self, name: str) -> Path | None:
        """Where the undo file of the component `name` is to be; None where none is wanted."""
        return None if self.path is None else self.path / undo_name(name)

    def has(self, name: str) -> bool:
        """Whether the undo file of the component `name` is there, of this very merge; so it is where none is wanted."""
        return self.path is None or is_undo_file(self.path / undo_name(name), self._plans[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return 0 if self.path is None else sum((self.path / undo_name(name)).stat().st_size for name in self._plans)

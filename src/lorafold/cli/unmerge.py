"""``lorafold unmerge``."""

from __future__ import annotations

from pathlib import Path

from ..api import unmerging
from .startup import progress
from .terminal import show, show_json


def unmerge(out: Path, restored: Path, *, base: Path | None, undo: Path | None, overwrite: bool, as_json: bool) -> None:
    """Restore, and say what was."""
    report = unmerging.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, progress=progress())
    if as_json:
        show_json(report.to_json())
    else:
        show(report.summary())

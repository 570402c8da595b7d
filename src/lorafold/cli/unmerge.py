"""``lorafold unmerge``."""

from __future__ import annotations

import json
from pathlib import Path

from ..api import unmerging
from ..engine.words import size
from ..errors import printable
from .startup import progress


def unmerge(out: Path, restored: Path, *, base: Path | None, undo: Path | None, overwrite: bool, as_json: bool) -> None:
    """Restore, and say what was."""
    nbytes = unmerging.unmerge(out, restored, base=base, undo=undo, overwrite=overwrite, progress=progress())
    if as_json:
        given = {name: None if path is None else str(path) for name, path in (("base", base), ("undo", undo))}
        print(json.dumps({"out": str(restored), **given, "bytes": nbytes}, indent=2))
    else:
        print(f"{printable(str(restored))} is the base of {printable(str(out))}, bit for bit: {size(nbytes)}")

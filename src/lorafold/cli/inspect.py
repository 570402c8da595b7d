"""``lorafold inspect``."""

from __future__ import annotations

import json
from pathlib import Path

from ..api.inspecting import inspect_path
from .reading import Reading
from .terminal import show_inspection


def inspect(path: Path, *, base: Path | None, reading: Reading, everything: bool, as_json: bool) -> None:
    """Explain what is at `path`."""
    inspection = inspect_path(path, reading.options(), base)
    if as_json:
        print(json.dumps(inspection, indent=2))
    else:
        show_inspection(inspection, everything=everything)

"""``lorafold inspect``."""

from __future__ import annotations

import json
from pathlib import Path

from ..adapters.options import ReadOptions
from ..api.inspecting import inspect_path
from .terminal import show_inspection


def inspect(path: Path, options: ReadOptions, *, base: Path | None, everything: bool, as_json: bool) -> None:
    """Explain what is at `path`."""
    inspection = inspect_path(path, options, base)
    if as_json:
        print(json.dumps(inspection, indent=2))
    else:
        show_inspection(inspection, everything=everything)

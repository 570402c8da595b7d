"""``lorafold inspect``."""

from __future__ import annotations

from pathlib import Path

from ..adapters.options import ReadOptions
from ..api import inspecting
from .terminal import show, show_json


def inspect(path: Path, options: ReadOptions, *, base: Path | None, everything: bool, as_json: bool) -> None:
    """Explain what is at `path`."""
    inspection = inspecting.inspect(path, base, read_options=options)
    if as_json:
        show_json(inspection.to_json())
    else:
        show(inspection.summary(everything=everything))

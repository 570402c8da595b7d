"""``lorafold convert``."""

from __future__ import annotations

from pathlib import Path

from ..adapters.options import ReadOptions
from ..api.converting import convert as run_convert
from ..options import ConvertOptions
from .flags import Chosen
from .terminal import show, show_json


def convert(adapter: Path, out: Path, to: str, options: ReadOptions, *, base: Path | None, chosen: Chosen, as_json: bool) -> None:
    """Convert, and say what was done."""
    done = run_convert(adapter, out, to, base=base, read_options=options, **chosen.of(ConvertOptions))
    if as_json:
        show_json(done.to_json())
    else:
        show(done.summary())
